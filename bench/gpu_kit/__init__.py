"""What a machine with a GPU and no network can measure in nine minutes, packed into one archive."""
