"""The first minutes on a GPU: ``python -m benchmarks.gpu``; see ``__main__``."""
