"""The names that ``--optim`` learns."""

NAMES = ("adamr", "afopt", "nkfac", "sgdph")
