"""Muon: the matrix sign of the momentum."""
