"""Tensor parallelism as transformers does it (``tp_plan="auto"`` under torchrun): which heads of a model are here."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from llm_accel.errors import UnsupportedModelError
from llm_accel.methods import WHOLE, HeadShard
from llm_accel.patches.base_attention import stores_latents

_PROJECTIONS = ("q_proj", "q_b_proj", "qkv_proj", "query_key_value")  # what queries come from, fused or not
_SPLITS = ("colwise", "packed_colwise")  # styles that leave each process its own heads; others gather the output


class Place(NamedTuple):
    """A process among those that share the weights of a model."""

    rank: int = 0
    size: int = 1
    group: Any = None


def place_of(model: Any) -> Place:
    """Where this process stands; alone unless transformers has spread the weights of the model."""
    size = int(getattr(model, "_tp_size", None) or 1)
    mesh = getattr(model, "_device_mesh", None)
    if size == 1 or mesh is None:
        return Place()
    mesh = mesh if mesh.ndim == 1 else mesh["tp"]
    return Place(mesh.get_local_rank(), size, mesh.get_group())


def splits_heads(model: Any, part: nn.Module) -> bool:
    """Whether the plan that the model was loaded with spreads the attention heads of ``part`` over processes. Some
    plans leave attention whole in every process, or gather what it needs."""
    if place_of(model).size == 1:
        return False
    prefix = next((name + "." for name, module in model.named_modules() if module is part and name), "")
    return any(
        name.startswith(prefix) and name.rpartition(".")[2] in _PROJECTIONS and style in _SPLITS
        for name, style in (model.tp_plan or {}).items()
    )


def head_shard(model: Any) -> HeadShard:
    """The heads of the decoder's layers that are here.

    Raises:
        UnsupportedModelError: the cache cannot be shared out by heads.
    """
    place = place_of(model)
    if place.size == 1:
        return WHOLE
    decoder = model.get_decoder()
    heads, name = int(decoder.config.num_attention_heads), model.config.model_type
    if not splits_heads(model, decoder):
        return HeadShard(query_heads=heads)
    if stores_latents(decoder):
        raise UnsupportedModelError(
            f"{name} stores one latent for all heads, and its plan for tensor parallelism spreads the heads over "
            f"{place.size} processes, each of which would keep other entries of it; load it without tp_plan, or with "
            "a plan that leaves attention whole."
        )
    for kind in ("num_attention_heads", "num_key_value_heads"):
        total = getattr(decoder.config, kind, None) or heads
        if total % place.size:
            raise UnsupportedModelError(
                f"{name} has {kind}={total}, which {place.size} processes cannot share evenly; use another number."
            )
    return HeadShard(*place, query_heads=heads // place.size)


def check_heads(shard: HeadShard, query: Tensor) -> None:
    """Raises :class:`UnsupportedModelError` where attention gets other heads than its plan promised."""
    if shard.query_heads and query.shape[1] != shard.query_heads:
        raise UnsupportedModelError(
            f"this process was to hold {shard.query_heads} query heads of each layer and got {query.shape[1]}; the "
            "plan that the model was loaded with does what llm_accel does not know, so load it with tp_plan='auto'."
        )


def own_file(path: str | Path, model: Any) -> Path:
    """The file of this process: each one has other heads. ``chat.safetensors`` -> ``chat.rank0of2.safetensors``."""
    place, path = place_of(model), Path(path)
    return path if place.size == 1 else path.with_name(f"{path.stem}.rank{place.rank}of{place.size}{path.suffix}")


def notes(model: Any, shard: HeadShard) -> dict[str, tuple[str, str]]:
    """What the report says about it; nothing of a model that is here as a whole."""
    place = place_of(model)
    if place.size == 1:
        return {}
    said = "attention is whole in every process"
    if shard.count > 1:
        said = f"heads are shared by {place.size} processes; lengths and bytes are those of the heads here"
    return {"tensor parallel": (f"rank {place.rank} of {place.size}", said)}
