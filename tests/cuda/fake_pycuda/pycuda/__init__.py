"""Stands in for pycuda on machines that have none; see `driver`."""
