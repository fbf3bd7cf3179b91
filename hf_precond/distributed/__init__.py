"""What several ranks do together: sums, shared work, sharded tensors."""
