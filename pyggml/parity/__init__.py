"""Is a backend right? Every op in float64, error bounds, and comparisons of results and graphs."""
