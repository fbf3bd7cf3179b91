"""The optimizers. They see matrices and statistics, never a model."""
