"""What a model is given: a chat by its template, a gap between texts, a pair; and what must follow."""
