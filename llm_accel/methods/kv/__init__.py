"""KV methods: which entries of the cache stay, by a score, a window or the roles of heads."""
