"""The model's side of the chat: the thread that owns it, what it says, and its experts as they move."""
