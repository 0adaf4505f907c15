"""Puts what takes visual tokens out on one model instance, and takes it off again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicCache

from llm_accel.errors import ConfigError, UnsupportedModelError
from llm_accel.methods import (
    Cut,
    Downsample,
    EntranceTokens,
    HeadScaling,
    LayerCut,
    MethodConfig,
    StepEviction,
    TowerTokens,
    VASparse,
    VideoTokens,
    VisualInput,
    WeightShift,
)
from llm_accel.patches.base_attention import SUPPORTED
from llm_accel.patches.families import FAMILIES, REFUSED, UNTESTED, VisionFamily, attribute, family_of
from llm_accel.patches.hook import DecoderHook
from llm_accel.patches.plan import ForImages, Plan
from llm_accel.patches.ranks import splits_heads
from llm_accel.patches.vision.arguments import check_features, check_layers, check_mask, check_rows, layers_of
from llm_accel.patches.vision.cut_plan import plan_cut
from llm_accel.patches.vision.cuts import BehindCutHook, CutHook
from llm_accel.patches.vision.features import FeatureProxy
from llm_accel.patches.vision.grounding import plan_grounding
from llm_accel.patches.vision.head_scaling import BlindEntry, BlindExit, install_blind_pass
from llm_accel.patches.vision.hooks import LabelsHook, VisualMaskHook
from llm_accel.patches.vision.packed import PACKED_HOOKS, install_packed
from llm_accel.patches.vision.tower import TowerHook, register_tower, tower_name
from llm_accel.patches.vision.watch import FEATURES
from llm_accel.patches.vision.weight_shift import StatesHook, install_states


def plan_visual(model: Any, configs: Sequence[MethodConfig], skipped: Mapping[int, str], trace: bool) -> dict[str, Any]:
    """The arguments of a plan that concern visual tokens; empty where no method must know them.

    Raises:
        UnsupportedModelError: the model has no visual tokens, or none that can be taken out; or, for any method, it
            builds the masks of its decoder itself.
        ConfigError: a method applied with it cannot work on what is left.
    """
    visual = [config for config in configs if isinstance(config, ForImages)]
    if not visual or model.config.model_type not in REFUSED:
        check_mask(model)
    if not visual:
        return {}
    names = ", ".join(config.name for config in visual)
    family = family_of(model, names)
    recurrent = _recurrent_layers(model)
    stock = {index: reason for index, reason in skipped.items() if reason != "named in skip_layers"}
    if not any(isinstance(config, VASparse) for config in visual):
        stock = {index: reason for index, reason in stock.items() if index not in recurrent}
    if stock:
        raise UnsupportedModelError(
            f"{names} acts on every layer, but layers {sorted(stock)} of {model.config.model_type} keep "
            f"caches of their own ({'; '.join(sorted(set(stock.values())))})."
        )
    stepwise = next((config for config in configs if isinstance(config, StepEviction)), None)
    if stepwise is not None and stepwise.relative_positions:
        raise ConfigError(
            f"{stepwise.spec()} gives tokens new positions, {names} keeps them; use positions='original'."
        )
    if stepwise is not None and trace:
        raise ConfigError(
            f"trace=True cannot record positions of {stepwise.spec()} together with {names}; leave it out."
        )
    cutting: list[LayerCut | VisualInput] = [config for config in visual if isinstance(config, LayerCut)]
    cutting += [config for config in visual if isinstance(config, VisualInput)]
    scaling = any(isinstance(config, HeadScaling) for config in visual)
    entering = any(isinstance(config, EntranceTokens) for config in visual)
    if cutting or scaling or entering:
        check_rows(model, names)
    cut = plan_cut(model, family, cutting[0], recurrent) if cutting else None
    if cut is not None:
        check_layers(model, names)
    for config in visual:
        if isinstance(config, VisualInput) and config.compact_on(family.axes) and family.axes > 1:
            raise ConfigError(
                f"{config.spec()} renumbers positions, but those of {family.model_type} say where in the image a "
                "token stands; use positions='original'."
            )
    marking = [config for config in visual if isinstance(config, VisualInput)]
    if marking:
        check_features(model, ", ".join(config.name for config in marking))
    if any(isinstance(config, VideoTokens) for config in visual):
        _check_videos(model, family, names)
    watching = [config for config in visual if isinstance(config, WeightShift) and config.reads_tower and config.acts]
    looking = [config.name for config in visual if isinstance(config, TowerTokens | Downsample) or config in watching]
    if looking and not family.declared:
        raise UnsupportedModelError(
            f"{', '.join(looking)} must know the vision tower, and {family.model_type} is {UNTESTED}. Supported: "
            f"{', '.join(FAMILIES)}; without a tower: fastv, dyvte, vasparse, random_tokens, stride_tokens."
        )
    if any(isinstance(config, Downsample) for config in visual) and not family.resizable:
        known = ", ".join(name for name, one in FAMILIES.items() if one.resizable)
        raise UnsupportedModelError(
            f"{names} shows the vision tower smaller images; where their tokens stand is not declared for "
            f"{family.model_type}, or it puts tiles of one size together; supported: {known}."
        )
    if watching or any(isinstance(config, TowerTokens) for config in visual):
        towers = [attribute(model.base_model, path) for path in family.towers]
        if any(splits_heads(model, tower) for tower in towers):
            raise UnsupportedModelError(
                f"{names} needs all heads of the vision tower, which the plan for tensor parallelism of "
                f"{family.model_type} spreads over processes; give a plan that leaves the tower whole."
            )
        bases = [_tower_base(tower) for tower in towers]
        base = next((base for base in bases if base not in SUPPORTED), None)
        if base is not None:
            raise UnsupportedModelError(
                f"{names} reads the vision tower, which runs attn_implementation={base!r}; supported: "
                f"{', '.join(SUPPORTED)}."
            )
    backends = {"exit": cut.origin} if cut and cut.origin else {}
    if not family.declared:
        backends["visual tokens"] = ("generic", f"{family.model_type} is {UNTESTED}")
    grounding = plan_grounding(model, configs, recurrent)
    backends |= grounding.pop("backends", {})
    return {"family": family, "cut": cut, "backends": backends, **grounding}


def _check_videos(model: Any, family: VisionFamily, names: str) -> None:
    """Raises :class:`UnsupportedModelError` for models of whose videos nobody knows the frames."""
    shown = hasattr(model.base_model, "get_video_features") and "video_token_id" in family.token_ids
    if not shown or not family.declared:
        reason = f"whose family is {UNTESTED}" if shown else "which has no videos, or sees their frames as images"
        known = ", ".join(name for name, one in FAMILIES.items() if "video_token_id" in one.token_ids)
        raise UnsupportedModelError(
            f"{names} compares the frames of a video, not in {family.model_type}, {reason}. Supported: {known}; for "
            "images and single frames: flowcut, visionzip, divprune."
        )


def _recurrent_layers(model: Any) -> frozenset[int]:
    """Layers that keep a state of fixed size and no keys. Rows that do not come to them never were."""
    layers = DynamicCache(config=model.get_decoder().config).layers
    return frozenset(index for index, layer in enumerate(layers) if not isinstance(layer, CacheLayerMixin))


def _tower_base(tower: Any) -> str:
    """The attention implementation of a tower, without our wrapper."""
    name: str = tower.config._attn_implementation
    return next((base for base in SUPPORTED if tower_name(base) == name), name)


def install_vision(model: Any, hook: DecoderHook) -> None:
    """Shadows the feature functions, hooks the models above the decoder, the layers of the tower and of the decoder."""
    uninstall_vision(model, hook.plan)  # what is left where an earlier plug-in was taken off the decoder alone
    plan, holder = hook.plan, model.base_model
    family = plan.family
    assert family is not None
    token_ids = tuple(getattr(model.config, name) for name in family.token_ids)
    holder.register_forward_pre_hook(VisualMaskHook(hook, token_ids), with_kwargs=True)
    if model is not holder and plan.visual:
        model.register_forward_pre_hook(LabelsHook(hook), with_kwargs=True)
    for name in FEATURES if plan.tokens is not None or plan.reads_tower else ():
        if hasattr(holder, name):
            setattr(holder, name, FeatureProxy(holder, hook, name))
    for path in family.towers if isinstance(plan.tokens, TowerTokens) or plan.reads_tower else ():
        tower = attribute(holder, path)
        tower.config._attn_implementation_internal = register_tower(_tower_base(tower))
        blocks = attribute(tower, family.blocks)
        for index, block in enumerate(blocks):
            block.register_forward_hook(TowerHook(index), prepend=True)
        if family.packed_rows:
            install_packed(blocks, family.merging(tower))
    if plan.head_scaling is not None:
        install_blind_pass(model.get_decoder())
    if plan.weight_shift is not None and plan.weight_shift.reads_states:
        install_states(model.get_decoder(), plan.shifted_layers)
    if plan.cut is not None:
        _install_cut(layers_of(model.get_decoder()), plan.cut, plan.cut_title)


def _install_cut(layers: Sequence[nn.Module], cut: Cut, title: str) -> None:
    for index in cut.layers:
        layers[index].register_forward_hook(CutHook(cut, title, index), with_kwargs=True, prepend=True)
    for index in range(min(cut.layers, default=len(layers)) + 1, len(layers)):
        layers[index].register_forward_pre_hook(BehindCutHook(index), with_kwargs=True)


def uninstall_vision(model: Any, plan: Plan) -> None:
    """Exact undo; a no-op on a model without these hooks."""
    if plan.family is None:
        return
    for part in model.modules():
        drop_hooks(part, VisualMaskHook, LabelsHook, CutHook, BehindCutHook, TowerHook, *PACKED_HOOKS)
        drop_hooks(part, BlindEntry, BlindExit, StatesHook)
        for name in FEATURES:
            if isinstance(part.__dict__.get(name), FeatureProxy):
                delattr(part, name)
        if isinstance(part, PreTrainedModel) and part.config._attn_implementation != _tower_base(part):
            part.config._attn_implementation_internal = _tower_base(part)


def drop_hooks(module: nn.Module, *kinds: type) -> None:
    """Removes the forward hooks of these kinds from one module."""
    for hooks, with_kwargs in (
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        (module._forward_hooks, module._forward_hooks_with_kwargs),
    ):
        for key in [key for key, hook in hooks.items() if isinstance(hook, kinds)]:
            del hooks[key]
            with_kwargs.pop(key, None)
