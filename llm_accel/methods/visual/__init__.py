"""Methods on visual tokens: which of them the language model sees, and how replies about an image are decoded."""
