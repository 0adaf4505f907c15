from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import PreTrainedModel

from tests.tiny import tiny_model


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    """No gradients and one thread, as everywhere outside of training."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model("llama")
