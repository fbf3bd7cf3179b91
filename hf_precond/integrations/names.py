"""The names that ``--optim`` learns."""

from __future__ import annotations

NAMES = ("adamr", "afopt", "nkfac", "sgdph")
