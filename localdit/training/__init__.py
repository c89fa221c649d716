"""Training: data, encoding ahead, methods, the loop, checkpoints and results."""
