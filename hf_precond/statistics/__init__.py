"""What is collected from a model's passes: second moments, entropies, Hessian products."""
