"""Which heads of one model a method acts on: counts them, and finds the profile that scores them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from llm_accel.assets import NEEDLE
from llm_accel.errors import ConfigError, UnsupportedModelError
from llm_accel.methods import HeadProfile, HeadShard, MethodConfig, ModelHeads, RetrievalHeads, load_profile
from llm_accel.patches.base_attention import stores_latents
from llm_accel.patches.identity import weight_hash

BUNDLED = NEEDLE / "heads.json"


def plan_heads(
    model: Any, configs: Sequence[MethodConfig], skipped: Mapping[int, str], shard: HeadShard
) -> dict[str, Any]:
    """The arguments of a plan that concern heads; empty where no method acts on heads. Profiles count the heads of the
    whole model, the plan those that are here."""
    method = next((config for config in configs if isinstance(config, RetrievalHeads)), None)
    if method is None:
        return {}
    counts = model_heads(model, skipped)
    profile = find_profile(model, method, counts) if method.needs_profile else None
    split, mask = method.split(counts, profile), method.mask(counts, profile)
    if split is not None and stores_latents(model.get_decoder()):
        raise UnsupportedModelError(
            f"{model.config.model_type} stores one latent for all heads, so heads cannot keep different entries; "
            "supported are models with a key and a value per KV head."
        )
    backends = {} if profile is None else {"heads": (f"{profile.method} profile", _origin(model, profile))}
    if split is not None:
        split = replace(split, full=tuple(shard.own(heads, counts.kv_heads) for heads in split.full))
    if mask is not None:
        mask = replace(mask, heads=tuple(shard.own(heads, counts.query_heads) for heads in mask.heads))
    return {"split": split, "mask": mask, "kv_heads": counts.kv_heads // shard.count, "backends": backends}


def model_heads(model: Any, skipped: Iterable[int] = ()) -> ModelHeads:
    """Layers and heads of a model's decoder."""
    config = model.get_decoder().config
    layers, query_heads = int(config.num_hidden_layers), int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or query_heads)
    gone = set(skipped)
    return ModelHeads(layers, query_heads, kv_heads, tuple(index for index in range(layers) if index not in gone))


def find_profile(model: Any, method: RetrievalHeads, counts: ModelHeads) -> HeadProfile:
    """The profile that a method names, or the bundled model's own.

    Raises:
        ConfigError: it cannot be read, is one of another model, or none was named and this is not the bundled model.
    """
    if method.heads is not None:
        profile = load_profile(method.heads, counts.query_heads)
        profile.check(counts.layers, counts.query_heads, counts.kv_heads)
        return profile
    if BUNDLED.is_file():
        profile = load_profile(BUNDLED)
        same_shape = profile.shape == (counts.layers, counts.query_heads, counts.kv_heads)
        if same_shape and profile.weights_hash == weight_hash(model):
            return profile
    raise ConfigError(
        f"{method.name}: heads=None works for the bundled model only, and these are other weights; find the heads of "
        "this model with `llm-accel heads --model NAME --out DIR`, then give heads=DIR/heads.json."
    )


def _origin(model: Any, profile: HeadProfile) -> str:
    if not profile.weights_hash:
        return f"of {profile.model or 'an unnamed model'}, which weights it was made for is not known"
    if profile.weights_hash == weight_hash(model):
        return "measured on these weights"
    return f"measured on other weights than these ({profile.model})"
