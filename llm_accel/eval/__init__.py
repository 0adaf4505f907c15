"""Evaluations of methods: one frame, and the tasks that run in it."""
