"""Hessian-vector products of a model's training loss."""
