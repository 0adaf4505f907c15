"""``llm-accel serve``: an OpenAI-compatible server on one accelerated model."""
