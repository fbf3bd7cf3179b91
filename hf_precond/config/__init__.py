"""The optimizers' fields: one validated dataclass per optimizer, saved as JSON."""
