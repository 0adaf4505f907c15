"""The leaderboard: RULER at equal compression, all methods that can be given it."""
