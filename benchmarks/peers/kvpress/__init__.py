"""kvpress on the same token ids."""
