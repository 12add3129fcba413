"""Data sets as their providers ship them, one file per data set."""
