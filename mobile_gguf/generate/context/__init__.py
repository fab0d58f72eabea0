"""A context of llama.cpp: how it is called, the texts whose rows are in it, how long they take."""
