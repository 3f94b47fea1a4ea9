"""Wire messages to domain values and back: the only place where the two meet."""
