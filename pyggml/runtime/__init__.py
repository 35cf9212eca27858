"""From compiled work to results: compile, plans, stores, arrays in and out."""
