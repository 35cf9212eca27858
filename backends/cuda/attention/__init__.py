"""Flash attention: the choice of its kernel, and the recording of its launches."""
