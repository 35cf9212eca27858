"""Flash attention: which kernel runs, and how it is recorded."""
