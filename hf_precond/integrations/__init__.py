"""The optimizers inside transformers' ``Trainer``: names, arguments, callback, checkpoints."""
