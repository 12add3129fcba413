"""What a fused pass does, worked out beforehand: its steps, and the weights in the form in which the ops take them."""
