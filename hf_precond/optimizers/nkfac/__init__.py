"""NKFAC: K-FAC whose inverses follow by Newton's iteration."""
