"""Trained networks as modules for inference alone."""
