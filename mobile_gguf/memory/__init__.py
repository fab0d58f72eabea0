"""What memory and processors there are, and who gets how much of them."""
