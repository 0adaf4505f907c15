"""Bundled tiny models and the scripts that train them from nothing."""
