"""What a network is, without its layers being run: topology, options, layers, the checks of its input."""
