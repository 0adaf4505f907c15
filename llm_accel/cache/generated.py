"""A cache layer that knows which entries belong to generated tokens, and what those looked at."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_accel.cache.layer import AccelLayer
from llm_accel.errors import UnsupportedCallError


class GeneratedLayer(AccelLayer):
    """Keys and values as in the base. The last ``held`` entries of every row are generated tokens, or sums of some.

    Attributes:
        visual: which entries are visual tokens, bool [B, P]; None before the first.
        received: attention that each entry got from the watched queries and from decode steps, fp32 [B, Hq, P]; None
            where nobody asks or the prompt has no image.
        saliency: attention that each generated token paid to the image, fp32 [B, Hk, P]; None before the first.
        generated: tokens generated so far.
        held: entries of these.
    """

    row_tensors = (*AccelLayer.row_tensors, "visual", "received", "saliency")
    plain_values = (*AccelLayer.plain_values, "generated", "held")

    def _clear(self) -> None:
        super()._clear()
        self.visual: Tensor | None = None
        self.received: Tensor | None = None
        self.saliency: Tensor | None = None
        self.generated = self.held = 0

    def _place(self, count: int) -> None:
        super()._place(count)
        for name in ("visual", "received", "saliency"):
            state = getattr(self, name)
            if state is not None:
                setattr(self, name, F.pad(state, (0, count)))

    def mark(self, visual: Tensor) -> None:
        """Tells which of the newest entries are visual tokens, bool [B, n]."""
        visual = visual.to(self.keys.device)
        earlier = F.pad(visual, (self.physical_length() - visual.shape[1], 0))
        self.visual = earlier if self.visual is None else self.visual | earlier

    def receive(self, votes: Tensor) -> None:
        """Adds the attention of some queries to all entries, fp32 [B, Hq, P]."""
        self.received = votes if self.received is None else self.received + votes

    def begin_generated(self) -> None:
        """The prompt is complete: what was generated before belongs to it from now on."""
        self.generated = self.held = 0

    def spoke(self, saliency: Tensor) -> None:
        """Counts the newest entry as a generated token, which paid so much attention to the image, fp32 [B]."""
        self.generated += 1
        self.held += 1
        if self.saliency is None:
            self.saliency = torch.zeros(self.keys.shape[:3], device=self.keys.device)
        self.saliency[..., -1] = saliency[:, None]

    def part_generated(self, tensor: Tensor) -> Tensor:
        """The part [B, H, held, ...] of [B, H, P, ...] that belongs to generated tokens."""
        return tensor[:, :, tensor.shape[2] - self.held :]

    def prune(self, into: Tensor, trace: bool) -> None:
        """Lets entries of generated tokens go where ``into``, int64 [B, Hk, held], tells: to themselves, to another one
        that they are added to, or nowhere (-1). As many stay in every row and head."""
        own = torch.arange(self.held, device=into.device)
        kept = (into == own).nonzero()[:, -1].view(*into.shape[:2], -1)
        if kept.shape[-1] == self.held:
            return
        moving = (into >= 0) & (into != own)
        self.keys, self.values = (self._summed(one, into, moving) for one in (self.keys, self.values))
        self.received, self.saliency = (
            None if one is None else self._summed(one[..., None], into, moving)[..., 0]
            for one in (self.received, self.saliency)
        )
        past = self.physical_length() - self.held
        prompt = torch.arange(past, device=into.device)
        if self.start is not None:
            prompt = torch.where(prompt < self.start[:, None, None], -1, prompt)
        self.keep(torch.cat([prompt.expand(*into.shape[:2], -1), kept + past], dim=-1), trace)
        self.held = kept.shape[-1]

    def _summed(self, tensor: Tensor, into: Tensor, moving: Tensor) -> Tensor:
        """[B, H, P, D] after the ``moving`` entries of the generated tokens were added to those that they go to."""
        groups = tensor.shape[1] // into.shape[1]
        into, moving = (one.repeat_interleave(groups, 1)[..., None] for one in (into, moving))
        part = self.part_generated(tensor)
        added = part.masked_fill(~moving, 0)
        part = part.scatter_add(2, into.clamp(min=0).expand_as(added), added)
        return torch.cat([tensor[:, :, : tensor.shape[2] - self.held], part], dim=2)

    def _gather(self, indices: Tensor) -> None:
        super()._gather(indices)
        self.visual = None if self.visual is None else _taken(self.visual, indices[:, 0])
        self.saliency = None if self.saliency is None else _taken(self.saliency, indices)
        if self.received is not None:
            groups = self.received.shape[1] // indices.shape[1]
            self.received = _taken(self.received, indices.repeat_interleave(groups, 1))

    def crop(self, tokens_to_remove: int) -> None:
        """Refused after a prompt with an image: what the removed tokens added up cannot be undone."""
        if self.pictured:
            raise UnsupportedCallError("this cache adds up attention and cannot be cropped; start with a new cache.")
        super().crop(tokens_to_remove)


def _taken(tensor: Tensor, indices: Tensor) -> Tensor:
    """Slots ``indices`` of the last dimension, zero where the index is -1."""
    return tensor.gather(-1, indices.clamp(min=0)).masked_fill(indices < 0, 0)
