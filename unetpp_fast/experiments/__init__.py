"""The demos and the paper's comparison."""
