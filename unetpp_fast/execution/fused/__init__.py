"""A pass over level buffers: forward, backward, as operators of PyTorch."""
