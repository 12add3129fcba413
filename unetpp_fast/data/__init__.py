"""Images with masks, and the patches that training draws from them."""
