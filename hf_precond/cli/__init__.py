"""The commands: run, list, explain, compare, doctor, bench."""
