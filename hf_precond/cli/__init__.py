"""The commands: run, list, explain, bench."""
