"""Which experts a pass uses, what such a choice is called, and what is counted of it."""
