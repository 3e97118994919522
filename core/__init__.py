"""What more than one pipeline needs: the format, models, checkpoints, the training loop."""
