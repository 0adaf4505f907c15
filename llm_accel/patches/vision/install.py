"""Puts what takes visual tokens out on one model instance, and takes it off again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from llm_accel.errors import ConfigError, UnsupportedModelError
from llm_accel.methods import LayerCut, MethodConfig, StepEviction, TowerTokens, VisualTokens
from llm_accel.patches.base_attention import SUPPORTED
from llm_accel.patches.families import VisionFamily, attribute, family_of
from llm_accel.patches.hook import DecoderHook
from llm_accel.patches.plan import Plan
from llm_accel.patches.vision.cuts import BehindCutHook, CutHook
from llm_accel.patches.vision.features import FeatureProxy, VideoProxy
from llm_accel.patches.vision.hooks import LabelsHook, VisualMaskHook
from llm_accel.patches.vision.tower import TowerHook, register_tower, tower_name

_PROXIES = {"get_image_features": FeatureProxy, "get_video_features": VideoProxy}


def plan_family(
    model: Any, configs: Sequence[MethodConfig], skipped: Mapping[int, str], trace: bool
) -> VisionFamily | None:
    """The family of a model whose visual tokens are to be taken out; None where no method does that.

    Raises:
        UnsupportedModelError: the model has no visual tokens, or none that can be taken out.
        ConfigError: a method beside it cannot work on what is left.
    """
    visual = [config for config in configs if isinstance(config, VisualTokens | LayerCut)]
    if not visual:
        return None
    names = ", ".join(config.name for config in visual)
    family = family_of(model, names)
    stock = {index: reason for index, reason in skipped.items() if reason != "named in skip_layers"}
    if stock:
        raise UnsupportedModelError(
            f"{names} takes tokens out of every layer, but layers {sorted(stock)} of {model.config.model_type} keep "
            f"caches of their own ({'; '.join(sorted(set(stock.values())))})."
        )
    stepwise = next((config for config in configs if isinstance(config, StepEviction)), None)
    if stepwise is not None and stepwise.relative_positions:
        raise ConfigError(
            f"{stepwise.spec()} gives tokens new positions, {names} keeps them; use positions='original'."
        )
    if stepwise is not None and trace:
        raise ConfigError(f"trace=True knows no positions for {stepwise.spec()} beside {names}; leave it out.")
    _check_cuts(model, family, [config for config in visual if isinstance(config, LayerCut)])
    if any(isinstance(config, TowerTokens) for config in visual):
        base = _tower_base(attribute(model.base_model, family.tower))
        if base not in SUPPORTED:
            raise UnsupportedModelError(
                f"{names} looks into the vision tower, which runs attn_implementation={base!r}; supported: "
                f"{', '.join(SUPPORTED)}."
            )
    return family


def _check_cuts(model: Any, family: VisionFamily, cuts: Sequence[LayerCut]) -> None:
    layers, first = int(model.get_decoder().config.num_hidden_layers), family.first_cut(model.config)
    for cut in cuts:
        if cut.after(layers) < first:
            raise ConfigError(
                f"{cut.spec()} lets visual tokens leave after layer {cut.after(layers)}, but {model.config.model_type} "
                f"adds features to them up to layer {first}; choose that layer or a later one."
            )


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
    if model is not holder:
        model.register_forward_pre_hook(LabelsHook(hook), with_kwargs=True)
    for name, proxy in _PROXIES.items() if plan.tokens is not None else ():
        if hasattr(holder, name):
            setattr(holder, name, proxy(holder, hook))
    if isinstance(plan.tokens, TowerTokens):
        tower = attribute(holder, family.tower)
        tower.config._attn_implementation_internal = register_tower(_tower_base(tower))
        for index, block in enumerate(attribute(tower, family.blocks)):
            block.register_forward_hook(TowerHook(index), prepend=True)
    if plan.cut is not None:
        _install_cut(model.get_decoder().layers, plan.cut, plan.cut.after(plan.layers))


def _install_cut(layers: Sequence[nn.Module], cut: LayerCut, last: int) -> None:
    if last == len(layers) - 1:
        return  # nothing is saved behind the last layer
    layers[last].register_forward_hook(CutHook(cut, last), with_kwargs=True, prepend=True)
    for layer in layers[last + 1 :]:
        layer.register_forward_pre_hook(BehindCutHook(), with_kwargs=True)


def uninstall_vision(model: Any, plan: Plan) -> None:
    """Exact undo; a no-op on a model without these hooks."""
    if plan.family is None:
        return
    for part in {model, model.base_model}:
        drop_hooks(part, VisualMaskHook, LabelsHook)
        for name, proxy in _PROXIES.items():
            if isinstance(part.__dict__.get(name), proxy):
                delattr(part, name)
    for layer in model.get_decoder().layers:
        drop_hooks(layer, CutHook, BehindCutHook)
    if hasattr(model.base_model, "get_image_features"):
        tower = attribute(model.base_model, plan.family.tower)
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
