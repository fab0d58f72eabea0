"""A model that another process serves: chats over any server with OpenAI's API."""
