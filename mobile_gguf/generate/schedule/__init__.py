"""Several answers at once: who is in the next decode, who gives way, and how many there are."""
