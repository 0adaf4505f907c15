"""Sparse attention: what attention computes; every entry stays in the cache."""
