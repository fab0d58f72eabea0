"""What a user of the library calls: a model is loaded, chatted with, embedded with, awaited."""
