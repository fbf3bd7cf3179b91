"""AdamR: Adam in the eigenbasis of the gradient's Kronecker second moments."""
