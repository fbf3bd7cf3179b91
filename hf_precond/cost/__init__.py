"""What a training step costs: operations, bytes and launches counted, milliseconds predicted."""
