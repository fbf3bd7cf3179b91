"""Optimizers to compare with, each from its paper; none of them is an ``--optim`` name."""
