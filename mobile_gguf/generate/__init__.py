"""From a prompt to an answer: which experts a token uses, tokens to text, what it cost."""
