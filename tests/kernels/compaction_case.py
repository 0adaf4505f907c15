"""Problems for cache compaction: shapes, dtypes and views that models produce."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn)


@dataclass(frozen=True)
class Case:
    batch: int = 2
    heads: int = 3
    slots: int = 41
    count: int = 17
    dim: int = 64
    width: int = 64
    dtype: torch.dtype = torch.float32
    scored: bool = True
    padded: int = 0

    def inputs(self, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Ascending indices with -1 first, keys and values with gaps between their rows, and scores."""
        generator = torch.Generator().manual_seed(0)

        def bits(*shape: int) -> Tensor:
            """Any bit pattern of the dtype, NaN included."""
            size = torch.empty((), dtype=self.dtype).element_size()
            return torch.randint(0, 256, (*shape[:-1], shape[-1] * size), generator=generator).byte().view(self.dtype)

        keys = bits(self.batch, self.slots, self.heads, self.dim).transpose(1, 2)
        values = bits(self.batch, self.heads, self.slots + 4, self.width)[:, :, 4:]
        chosen = torch.rand(self.batch, self.heads, self.slots, generator=generator).argsort(-1)[..., : self.count]
        indices = chosen.sort(-1).values
        indices[0, :, : self.padded] = -1
        scores = torch.randn(self.batch, self.heads, self.slots, generator=generator).to(device)
        return indices.to(device), keys.to(device), values.to(device), scores if self.scored else None


CASES = {
    "plain": Case(),
    "everything": Case(count=41),
    "nothing": Case(count=0),
    "one": Case(batch=1, heads=1, slots=1, count=1),
    "no_scores": Case(scored=False),
    "shorter_row": Case(padded=5),
    "several_blocks": Case(slots=300, count=290, dim=256, width=32, batch=1),
    "odd_dims": Case(dim=80, width=96),
    "latents": Case(heads=1, dim=192, width=128),
    **{str(dtype).removeprefix("torch."): Case(dtype=dtype) for dtype in FLOATS},
}


def same_bits(ours: Tensor, expected: Tensor) -> bool:
    """Whether two tensors hold the same bits; NaN equals itself."""
    return ours.dtype == expected.dtype and torch.equal(
        ours.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8)
    )


def expected(case: Case) -> list[Tensor]:
    """Entry by entry; scores last, if there are any. Empty slots are left out of what is compared."""
    indices, keys, values, scores = case.inputs()
    parts = []
    for source in (keys, values) if scores is None else (keys, values, scores):
        rows = [source[b, h, indices[b, h].clamp(min=0)] for b in range(case.batch) for h in range(case.heads)]
        parts.append(torch.stack(rows).view(case.batch, case.heads, case.count, *source.shape[3:]))
    return parts
