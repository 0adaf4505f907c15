"""The arithmetic of a model before it is loaded: bytes, batches, step times."""
