"""From a graph to results: compile, plans, stores, arrays in and out."""
