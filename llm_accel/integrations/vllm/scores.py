"""Scores of patches from a vision tower of vLLM's that stays whole: hooks on its attention modules see it run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from llm_accel.methods import TowerTokens
from llm_accel.patches.vision.tower import TowerPass

Heads = Callable[[Any, Sequence[Tensor]], Iterable[tuple[Tensor, Tensor, Tensor]]]
"""From an attention module and its query, key and value to those of images taken together, [B, h, S, d]."""


class TowerScores:
    """What a method makes of the patches of images on their way through a tower.

    Hooks hang on the attention modules: where a layer may be compiled, hooks on it do not run.

    Args:
        method: scores.
        attentions: the attention modules of the layers in which each patch sees the whole image, by their index.
        last: index of the layer whose output is used.
        class_token: whether a class token comes first.
        heads: how such a module is given its tensors.
    """

    def __init__(
        self, method: TowerTokens, attentions: Mapping[int, nn.Module], last: int, class_token: bool, heads: Heads
    ) -> None:
        self._method, self._layers, self._last = method, list(attentions), last
        self._class_token, self._heads = class_token, heads
        self._running: TowerPass | None = None
        for index, attention in attentions.items():
            attention.register_forward_pre_hook(self._seen, with_kwargs=True)
            attention.register_forward_hook(lambda _module, _args, output, layer=index: self._after(layer, output))

    @contextmanager
    def running(self) -> Iterator[TowerPass]:
        """A pass; its ``values()`` are there once images have been through the tower."""
        self._running = TowerPass(
            self._method,
            class_token=self._class_token,
            last=self._last,
            inside=False,
            parts=None,
            layers=self._layers,
            keeps_class=False,
        )
        try:
            yield self._running
        finally:
            self._running = None

    def _seen(self, module: Any, args: Any, kwargs: Any) -> None:
        if self._running is not None:
            tensors = [*args, *(kwargs[name] for name in ("query", "key", "value") if name in kwargs)]
            for query, key, value in self._heads(module, tensors):
                self._running.see(query, key, value, module.scale)

    def _after(self, layer: int, output: Tensor) -> None:
        if self._running is not None:
            self._running.after(layer, output)


def joined_heads(module: Any, tensors: Sequence[Tensor]) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
    """:data:`Heads` of modules that get [B, S, h * d] of each: of tiles of one size, and nothing else."""
    query, key, value = (one.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for one in tensors)
    yield query, key, value
