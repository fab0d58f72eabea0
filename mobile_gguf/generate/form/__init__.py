"""An answer in the model's own form: its thoughts, its calls of tools, and the text for its reader."""
