"""A fake pycuda for machines without a GPU; see `driver`."""
