"""How a pass is computed: the reference, the backends, and who picks between them."""
