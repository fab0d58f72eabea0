"""What the chat keeps: conversations, settings, and which models there are."""
