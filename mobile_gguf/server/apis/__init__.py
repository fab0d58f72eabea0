"""Other APIs than OpenAI's completions: each translates its requests to a ChatRequest, and events back."""
