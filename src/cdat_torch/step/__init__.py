"""One training step: the loss, the measurement along the direction, the rate, the checkpoint."""
