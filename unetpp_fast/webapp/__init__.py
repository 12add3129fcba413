"""The page of `unetpp-fast app`: an image in, its mask out, and what every level costs."""
