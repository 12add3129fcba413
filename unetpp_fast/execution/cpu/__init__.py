"""Inference on a CPU by oneDNN."""
