"""What a plug-in did in the last call: lengths, bytes, and what was skipped and why."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class LayerReport:
    """One layer after the last call.

    Attributes:
        layer: index of the layer.
        logical_length: tokens that the layer has seen; what transformers reads as the cache length.
        physical_length: KV entries stored per KV head (of the longest row, and of its longest head).
        kv_bytes: bytes of the storage that holds keys and values.
        dense_kv_bytes: bytes that the dense model would hold.
        evicted: entries gone per KV head: logical minus physical length, which counts on average over the heads of a
            row where they hold different numbers of entries.
        state_bytes: bytes of a linear-attention state, which stays as it is.
        sparse_calls: attention calls that a sparse attention method computed; the others were dense.
        grounding: what a method against hallucination changed in the layer, name -> a list with an item per row or a
            number: `scaled_heads` (query heads), entries by what they are (`visual`, `local`, `summary`, `sinks`,
            `visual_sinks`), and `shifted` of `asked` pairs of a query and a head whose attention was corrected.
        skipped_reason: why the layer was left as it is, or None.
        kept: with ``trace=True``, original positions of the entries kept when the prompt was compressed, int64
            [B, Hk, n], ascending, counted from the first real token of each row; -1 first where a row keeps fewer.
    """

    layer: int
    logical_length: int = 0
    physical_length: int = 0
    kv_bytes: int = 0
    dense_kv_bytes: int = 0
    evicted: int = 0
    state_bytes: int = 0
    sparse_calls: int = 0
    grounding: dict[str, Any] = field(default_factory=dict)
    skipped_reason: str | None = None
    kept: Tensor | None = None


@dataclass
class Report:
    """The whole model after the last call; ``str()`` gives a card to read, :meth:`to_dict` plain data.

    Attributes:
        method: the methods with the options that differ from their defaults.
        backends: operation -> (backend, reason).
        layers: one entry per layer; empty before the first call.
        visual_tokens_before: visual tokens of the prompt, or None for a text model.
        visual_tokens_after: visual tokens that reached the last layer.
        exit_layer: layer after which visual tokens leave, or None.
        chosen: what ``auto`` chose and why, or None.
        warnings: anything that a user should know.
    """

    method: str
    backends: dict[str, tuple[str, str]] = field(default_factory=dict)
    layers: list[LayerReport] = field(default_factory=list)
    visual_tokens_before: int | None = None
    visual_tokens_after: int | None = None
    exit_layer: int | None = None
    chosen: str | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def kv_bytes(self) -> int:
        """Bytes held by keys and values in all layers."""
        return sum(layer.kv_bytes for layer in self.layers)

    @property
    def dense_kv_bytes(self) -> int:
        """Bytes that the dense model would hold at the same logical length."""
        return sum(layer.dense_kv_bytes for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; tensors become lists."""
        data = asdict(self)
        for layer, plain in zip(self.layers, data["layers"], strict=True):
            plain["kept"] = None if layer.kept is None else layer.kept.tolist()
        return data | {"kv_bytes": self.kv_bytes, "dense_kv_bytes": self.dense_kv_bytes}

    def __str__(self) -> str:
        lines = [f"llm_accel {self.method}"]
        if not self.layers:
            lines.append("  no call yet")
        else:
            share = self.kv_bytes / self.dense_kv_bytes if self.dense_kv_bytes else 1.0
            lines.append(
                f"  KV cache  {_mib(self.kv_bytes)} instead of {_mib(self.dense_kv_bytes)} ({share:.1%} of dense)"
            )
            if self.visual_tokens_before:
                kept = f"{self.visual_tokens_after} of {self.visual_tokens_before}"
                cut = "" if self.exit_layer is None else f", some left after layer {self.exit_layer}"
                lines.append(f"  visual    {kept} visual tokens reach the last layer{cut}")
            ours = [layer for layer in self.layers if layer.skipped_reason is None]
            if ours:
                longest = max(ours, key=lambda layer: layer.physical_length)
                lines.append(
                    f"  entries   {longest.physical_length} stored of {longest.logical_length} seen,"
                    f" in {len(ours)} of {len(self.layers)} layers"
                )
            lines.extend(_grounding(self.layers))
            for reason in sorted({layer.skipped_reason for layer in self.layers if layer.skipped_reason}):
                indices = [str(layer.layer) for layer in self.layers if layer.skipped_reason == reason]
                lines.append(f"  skipped   layers {', '.join(indices)}: {reason}")
        lines.extend(f"  {name:<9} {backend} ({reason})" for name, (backend, reason) in self.backends.items())
        if self.chosen is not None:
            lines.append(f"  chosen    {self.chosen}")
        lines.extend(f"  warning   {text}" for text in self.warnings)
        return "\n".join(lines)


def _grounding(layers: list[LayerReport]) -> list[str]:
    """What a method against hallucination changed, over all layers."""
    lines = []
    scaled = [layer for layer in layers if "scaled_heads" in layer.grounding]
    if scaled:
        per_row = [len(heads) for layer in scaled for heads in layer.grounding["scaled_heads"]]
        lines.append(f"  heads     {sum(per_row) / len(per_row):.1f} per layer and row scaled, in {len(scaled)} layers")
    shifted = [layer.grounding for layer in layers if "shifted" in layer.grounding]
    if shifted:
        done, asked = (sum(one[name] for one in shifted) for name in ("shifted", "asked"))
        lines.append(f"  attention {done} of {asked} rows of heads shifted, in {len(shifted)} layers")
    return lines


def _mib(count: int) -> str:
    return f"{count / 2**20:.2f} MiB"
