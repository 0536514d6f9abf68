"""attnspec."""
