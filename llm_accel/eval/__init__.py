"""Evaluations: needle in a haystack, vision, the bundled tiny models."""
