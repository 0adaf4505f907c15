"""Operations on tensors: one folder each, with a plain-torch reference and an interface that chooses a backend."""
