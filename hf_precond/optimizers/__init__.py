"""The optimizers, one folder each, and the step that they share."""
