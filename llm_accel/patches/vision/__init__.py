"""Visual tokens: which of them reach the language model, and after which layer they leave it."""
