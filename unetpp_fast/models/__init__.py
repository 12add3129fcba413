"""The networks that people build, and prediction with them."""
