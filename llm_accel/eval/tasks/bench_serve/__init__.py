"""Load on OpenAI-compatible servers: what is sent, how long it takes, and how servers compare."""
