"""Pages about a training or a comparison: one HTML file each, which needs no server, script or network."""
