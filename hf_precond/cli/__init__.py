"""The commands: run, list, explain."""
