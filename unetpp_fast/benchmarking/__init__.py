"""Times and memory: how they are taken, kept and shown."""
