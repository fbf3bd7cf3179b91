"""What is found in a model: its layers, attentions and parameters."""
