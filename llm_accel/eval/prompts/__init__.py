"""Prompts of exact length, assembled in token ids: texts, haystacks, needles."""
