"""Everything that touches a HuggingFace model: hooks, sessions, cache layers, attention and generate."""
