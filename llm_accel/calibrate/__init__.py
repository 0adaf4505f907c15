"""Runs a model to learn about it before it is accelerated."""
