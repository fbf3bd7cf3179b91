"""NKFAC's parts: Kronecker factors, their inverses, the authors' rules."""
