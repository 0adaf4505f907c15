"""Adapters for evaluation harnesses. The harnesses are imported inside their own module only."""
