"""Needle in a haystack: built-in grammar, task, runner and plots."""
