"""The template of the step, and what every optimizer takes from it."""
