"""Running models: sessions, sampling, and text."""
