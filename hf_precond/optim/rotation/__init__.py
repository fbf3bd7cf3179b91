"""AdamR's parts: which sides are rotated, the eigenbases, the step in them."""
