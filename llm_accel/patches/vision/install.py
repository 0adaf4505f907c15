"""Puts what takes visual tokens out on one model instance, and takes it off again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from llm_accel.errors import ConfigError, UnsupportedModelError
from llm_accel.methods import (
    Cut,
    LayerCut,
    MethodConfig,
    ReplyDecoding,
    SmallerImage,
    StepEviction,
    TowerTokens,
    VisualInput,
)
from llm_accel.patches.base_attention import SUPPORTED
from llm_accel.patches.families import FAMILIES, UNTESTED, attribute, family_of
from llm_accel.patches.hook import DecoderHook
from llm_accel.patches.plan import Plan
from llm_accel.patches.ranks import splits_heads
from llm_accel.patches.vision.cut_plan import plan_cut
from llm_accel.patches.vision.cuts import BehindCutHook, CutHook
from llm_accel.patches.vision.features import FEATURES, FeatureProxy
from llm_accel.patches.vision.hooks import LabelsHook, VisualMaskHook
from llm_accel.patches.vision.tower import TowerHook, register_tower, tower_name


def plan_visual(model: Any, configs: Sequence[MethodConfig], skipped: Mapping[int, str], trace: bool) -> dict[str, Any]:
    """The arguments of a plan that concern visual tokens; empty where no method must know them.

    Raises:
        UnsupportedModelError: the model has no visual tokens, or none that can be taken out.
        ConfigError: a method beside it cannot work on what is left.
    """
    visual = [config for config in configs if isinstance(config, VisualInput | LayerCut | ReplyDecoding)]
    if not visual:
        return {}
    names = ", ".join(config.name for config in visual)
    family = family_of(model, names)
    stock = {index: reason for index, reason in skipped.items() if reason != "named in skip_layers"}
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
        raise ConfigError(f"trace=True knows no positions for {stepwise.spec()} beside {names}; leave it out.")
    cutting: list[LayerCut | VisualInput] = [config for config in visual if isinstance(config, LayerCut)]
    cutting += [config for config in visual if isinstance(config, VisualInput)]
    cut = plan_cut(model, family, cutting[0]) if cutting else None
    for config in visual:
        if isinstance(config, VisualInput) and config.positions == "compact" and family.axes > 1:
            raise ConfigError(
                f"{config.spec()} counts positions anew, but those of {family.model_type} say where in the image a "
                "token stands; use positions='original'."
            )
    looking = [config.name for config in visual if isinstance(config, TowerTokens | SmallerImage)]
    if looking and not family.declared:
        raise UnsupportedModelError(
            f"{', '.join(looking)} must know the vision tower, and {family.model_type} is {UNTESTED}. Supported: "
            f"{', '.join(FAMILIES)}; without a tower: fastv, dyvte, vasparse, random_tokens, stride_tokens."
        )
    if any(isinstance(config, SmallerImage) for config in visual) and not family.resizable:
        known = ", ".join(name for name, one in FAMILIES.items() if one.resizable)
        raise UnsupportedModelError(
            f"{names} shows the vision tower smaller images, but {family.model_type} puts tiles of one size together; "
            f"supported: {known}."
        )
    if any(isinstance(config, TowerTokens) for config in visual):
        towers = [attribute(model.base_model, path) for path in family.towers]
        if any(splits_heads(model, tower) for tower in towers):
            raise UnsupportedModelError(
                f"{names} looks at all heads of the vision tower, which the plan for tensor parallelism of "
                f"{family.model_type} spreads over processes; give a plan that leaves the tower whole."
            )
        bases = [_tower_base(tower) for tower in towers]
        base = next((base for base in bases if base not in SUPPORTED), None)
        if base is not None:
            raise UnsupportedModelError(
                f"{names} looks into the vision tower, which runs attn_implementation={base!r}; supported: "
                f"{', '.join(SUPPORTED)}."
            )
    backends = {"exit": cut.origin} if cut and cut.origin else {}
    if not family.declared:
        backends["visual tokens"] = ("generic", f"{family.model_type} is {UNTESTED}")
    return {"family": family, "cut": cut, "backends": backends}


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
    for name in FEATURES if plan.tokens is not None else ():
        if hasattr(holder, name):
            setattr(holder, name, FeatureProxy(holder, hook, name))
    for path in family.towers if isinstance(plan.tokens, TowerTokens) else ():
        tower = attribute(holder, path)
        tower.config._attn_implementation_internal = register_tower(_tower_base(tower))
        for index, block in enumerate(attribute(tower, family.blocks)):
            block.register_forward_hook(TowerHook(index), prepend=True)
    if plan.cut is not None:
        _install_cut(model.get_decoder().layers, plan.cut, plan.cut_title)


def _install_cut(layers: Sequence[nn.Module], cut: Cut, title: str) -> None:
    for index in cut.layers:
        layers[index].register_forward_hook(CutHook(cut, title, index), with_kwargs=True, prepend=True)
    for layer in layers[min(cut.layers, default=len(layers)) + 1 :]:
        layer.register_forward_pre_hook(BehindCutHook(), with_kwargs=True)


def uninstall_vision(model: Any, plan: Plan) -> None:
    """Exact undo; a no-op on a model without these hooks."""
    if plan.family is None:
        return
    for part in {model, model.base_model}:
        drop_hooks(part, VisualMaskHook, LabelsHook)
        for name in FEATURES:
            if isinstance(part.__dict__.get(name), FeatureProxy):
                delattr(part, name)
    for layer in model.get_decoder().layers:
        drop_hooks(layer, CutHook, BehindCutHook)
    known = plan.family.declared and hasattr(model.base_model, "get_image_features")
    for path in plan.family.towers if known else ():
        tower = attribute(model.base_model, path)
        tower.config._attn_implementation_internal = _tower_base(tower)
        for block in attribute(tower, plan.family.blocks):
            drop_hooks(block, TowerHook)


def drop_hooks(module: nn.Module, *kinds: type) -> None:
    """Removes the forward hooks of these kinds from one module."""
    for hooks, with_kwargs in (
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        (module._forward_hooks, module._forward_hooks_with_kwargs),
    ):
        for key in [key for key, hook in hooks.items() if isinstance(hook, kinds)]:
            del hooks[key]
            with_kwargs.pop(key, None)
