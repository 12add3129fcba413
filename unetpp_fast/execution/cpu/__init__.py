"""What inference on a CPU keeps between calls: buffers and composed weights."""
