"""Private names of other packages, each in one place with the release it was read in."""
