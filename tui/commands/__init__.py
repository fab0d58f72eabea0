"""What a person can tell the chat: slash commands, their values, and jobs in the background."""
