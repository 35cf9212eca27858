"""Is a backend right? The float64 statement of every op, the bounds, and how results compare."""
