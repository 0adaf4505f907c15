"""Problems for slot write, and their answer entry by entry."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llm_accel.kernels.slot_write import slot_write
from tests.kernels.compaction_case import FLOATS, same_bits


@dataclass(frozen=True)
class Case:
    """Entries with gaps between their rows, new ones as a projection leaves them, positions in any order."""

    batch: int = 2
    heads: int = 3
    slots: int = 37
    dim: int = 16
    width: int = 16
    dtype: torch.dtype = torch.float32
    scored: bool = True
    shared_positions: bool = False

    def inputs(self, device: str = "cpu") -> dict[str, Tensor | None]:
        """The arguments by name."""
        generator = torch.Generator().manual_seed(self.slots)
        size = (self.batch, self.heads, self.slots)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(self.dtype)

        positions = torch.rand(*size, generator=generator).argsort(-1) * 3 - 1
        given = {
            "keys": randn(self.batch, self.slots, self.heads, self.dim).transpose(1, 2),
            "values": randn(self.batch, self.heads, self.slots + 4, self.width)[:, :, 4:],
            "new_key": randn(self.batch, 1, self.heads, self.dim).transpose(1, 2),
            "new_value": randn(self.batch, 1, self.heads, self.width).transpose(1, 2),
            "spare": torch.randint(self.slots, (self.batch, self.heads), generator=generator),
            "positions": positions[:, :1].expand(size) if self.shared_positions else positions,
            "scores": torch.rand(*size, generator=generator) if self.scored else None,
        }
        return {name: None if tensor is None else tensor.to(device) for name, tensor in given.items()}

    def check(self, device: str = "cpu") -> None:
        """Writes, and compares everything with a loop."""
        given, before = self.inputs(device), self.inputs()
        positions, scores = slot_write(**given)  # type: ignore[arg-type]
        for row in range(self.batch):
            for head in range(self.heads):
                slot = int(before["spare"][row, head])
                before["keys"][row, head, slot] = before["new_key"][row, head, 0]
                before["values"][row, head, slot] = before["new_value"][row, head, 0]
        for name in ("keys", "values"):
            assert same_bits(given[name].cpu(), before[name])
        for row in range(self.batch):
            for head in range(self.heads):
                slot, expected = int(before["spare"][row, head]), before["positions"][row, head].clone()
                expected[slot] = expected.max() + 1
                assert positions[row, head].tolist() == expected.tolist()
                if self.scored:
                    expected = before["scores"][row, head].clone()
                    expected[slot] = 0.0
                    assert scores[row, head].tolist() == expected.tolist()
        assert torch.equal(given["positions"].cpu(), before["positions"])  # in memory of their own
        assert (scores is not None) == self.scored and positions.is_contiguous()


CASES = {
    "plain": Case(),
    "no_scores": Case(scored=False),
    "one_slot": Case(slots=1),
    "several_blocks": Case(slots=2100, batch=1, heads=2),
    "odd_dims": Case(dim=80, width=96),
    "one_row_of_positions": Case(shared_positions=True),
    **{str(dtype).removeprefix("torch."): Case(dtype=dtype) for dtype in FLOATS[:-1]},
}
