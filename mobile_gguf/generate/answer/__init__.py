"""What a caller gets: chunks, a joined reply, log probabilities, a receipt."""
