"""Decoding as one compiled graph over buffers of fixed size; the prompt stays eager."""
