"""The training recipe, its loss and metrics, checkpoints, several processes."""
