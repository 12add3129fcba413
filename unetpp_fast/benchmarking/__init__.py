"""Times and memory: how they are measured, recorded and shown."""
