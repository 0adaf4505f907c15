"""Other packages on the same prompts, each in an environment of its own."""
