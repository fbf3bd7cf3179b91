"""Pure functions on batches of matrices; imports torch only."""
