"""``hf-precond bench``: optimizers tuned alike on tasks, and compared on fresh seeds."""
