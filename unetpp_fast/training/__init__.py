"""Training: the loop, the recipe, loss and metrics, checkpoints, several processes."""
