"""What the vision tower attends to, for methods that mark visual tokens by it: seen in one call of the model, told to
its decoder in the same call."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_accel.errors import UnsupportedCallError
from llm_accel.methods import TowerView
from llm_accel.methods.visual.tower import received, relation

FEATURES = ("get_image_features", "get_video_features")
MARKS = "llm_accel_marks"  # beside features that generate has computed before it calls the model
_ENCODED = {"get_image_features": "image", "get_video_features": "video"}
SHOWN: ContextVar[TowerMarks | None] = ContextVar("llm_accel_marks", default=None)


class TowerMarks:
    """The marks of all images of one call of a model, which carries it to its decoder. Opaque, so that it goes through
    hooks that move tensors.

    Args:
        places: for each function of the model that gives features, where the placeholders of its tokens stand, bool
            [B, T].
    """

    def __init__(self, places: dict[str, Tensor]) -> None:
        self.places = places
        self.found: dict[str, list[Tensor]] = {}

    def add(self, name: str, marks: Sequence[Tensor]) -> None:
        """The marks of the tokens of each image, int8 [n] each, in the order of a call of the function ``name``."""
        self.found.setdefault(name, []).extend(marks)

    def placed(self, real: Tensor) -> Tensor:
        """Marks of all tokens of the call, int8 [B, T]; ``real``: bool [B, T].

        Raises:
            UnsupportedCallError: there are other visual tokens than those whose images went through the tower.
        """
        marks = torch.zeros(real.shape, dtype=torch.int8, device=real.device)
        for name, place in self.places.items():
            found = self.found.get(name)
            own = place.to(real.device)
            if found is None and not bool(own.any()):
                continue
            told = torch.cat(found or [torch.zeros(0, dtype=torch.int8)]).to(real.device)
            copies, left = divmod(int(own.sum()), max(1, len(told)))
            if left or not copies or len(own) % copies:
                raise UnsupportedCallError(
                    f"the prompt has {int(own.sum())} visual tokens, and what the vision tower attended to is known of "
                    f"{len(told)}; give the pixels of all of them together with input_ids."
                )
            # generate repeats rows one by one, and the images of a row as often
            per_row = told.split(own[::copies].sum(-1).tolist())
            marks[own] = torch.cat([row for row in per_row for _ in range(copies)])
        return marks

    def add_encoded(self, encoded: Any) -> None:
        """The marks that lie beside features which the model is given in place of pixels."""
        for name, kind in _ENCODED.items():
            known = getattr((encoded or {}).get(kind), MARKS, None)
            if known is not None:
                self.add(name, known)


class TowerWatch:
    """Attention to each patch in two layers of a tower, from the class token or from all patches.

    Args:
        first, last: the layers.
        keeps_class: whether the class token becomes a visual token, the first one of its image.
    """

    def __init__(self, first: int, last: int, keeps_class: bool) -> None:
        self.first, self.last, self.keeps_class = first, last, keeps_class
        self._seen: dict[int, list[Tensor]] = {}

    def sees(self, layer: int) -> bool:
        """Whether a layer is looked at."""
        return layer in (self.first, self.last)

    def see(self, layer: int, views: Sequence[TowerView], left: Sequence[tuple[Tensor, int] | None]) -> None:
        """One layer, of which ``views`` are the attention calls.

        Args:
            left: for each of them which patches its rows are, int64 [B, n], -1 for padding, and how many there were
                before some left; None: all are there.
        """
        found: list[Tensor] = []
        for view, still in zip(views, left, strict=True):
            paid = relation(view)[:, 1:] if view.class_token else received(view)
            known = torch.stack([paid, torch.ones_like(paid)], -1)
            if still is not None:
                kept, patches = still
                rows = torch.where(kept < 0, patches, kept)[..., None].expand(-1, -1, 2)
                full = known.new_zeros(known.shape[0], patches + 1, 2)
                known = full.scatter(1, rows, known)[:, :patches]
            found.extend(known)
        self._seen[layer] = found

    def values(self) -> list[Tensor]:
        """Per tile: attention in the first layer, in the last, and whether the patch was there, fp32 [patches, 3]."""
        first, last = self._seen[self.first], self._seen[self.last]
        values = [torch.cat([one[:, :1], other], -1) for one, other in zip(first, last, strict=True)]
        return [F.pad(one, (0, 0, int(self.keeps_class), 0)) for one in values]
