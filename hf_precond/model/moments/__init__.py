"""Second moments collected from a model's passes."""
