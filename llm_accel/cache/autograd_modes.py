"""Tensors that outlive a call, whichever mode of autograd the next call runs in.

What is made in inference mode can be neither written nor saved for a gradient outside of it; what takes part in a
recorded computation cannot be overwritten before its gradient was asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor


def thawed(held: Tensor) -> Tensor:
    """``held`` itself, or a copy where it was made in inference mode and the running call is outside of it."""
    return held.clone() if held.is_inference() and not torch.is_inference_mode_enabled() else held


def writable(held: Tensor, new: Tensor) -> Tensor:
    """``held`` itself, or a copy where writing ``new`` into it would be recorded: the attention of earlier steps needs
    it as it was."""
    recorded = torch.is_grad_enabled() and (held.requires_grad or new.requires_grad)
    return held.clone() if recorded else held
