"""References for dropped visual tokens that share nothing with the package: rows removed, or keys hidden, by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

_PER_TOKEN = ("inputs_embeds", "position_ids", "visual_pos_masks", "deepstack_visual_embeds")


def decoder_inputs(model: PreTrainedModel, batch: dict[str, Any]) -> dict[str, Any]:
    """What the decoder of the unpatched model is called with for one row without padding."""
    seen: dict[str, Any] = {}

    def record(decoder: object, args: object, kwargs: dict[str, Any]) -> None:
        seen.update({name: kwargs.get(name) for name in _PER_TOKEN})

    hook = model.get_decoder().register_forward_pre_hook(record, with_kwargs=True)
    model(**batch, use_cache=False)
    hook.remove()
    length = seen["inputs_embeds"].shape[1]
    if seen["position_ids"] is None:
        seen["position_ids"] = torch.arange(length)[None]
    return {name: value for name, value in seen.items() if value is not None}


@contextmanager
def features_changed(model: PreTrainedModel, change: Callable[[Any], None]) -> Iterator[None]:
    """The model with what its ``get_image_features`` returns changed in place."""
    genuine = model.base_model.get_image_features

    def changed(*args: object, **kwargs: object) -> Any:
        output = genuine(*args, **kwargs)
        change(output)
        return output

    model.base_model.get_image_features = changed
    try:
        yield
    finally:
        del model.base_model.get_image_features


def removed(
    model: PreTrainedModel, batch: dict[str, Any], dropped: Tensor, steps: int = 6, compact: bool = False
) -> Tensor:
    """Logits [steps, vocabulary] of greedy decoding without a cache, after the rows ``dropped``, bool [T], were taken
    out of the decoder's inputs; all others keep their positions, or are counted anew."""

    def take_out(decoder: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        length = kwargs["inputs_embeds"].shape[1]
        kept = ~torch.nn.functional.pad(dropped, (0, length - len(dropped)))
        given = dict(kwargs)
        if given.get("position_ids") is None:
            given["position_ids"] = torch.arange(length)[None]
        given["position_ids"] = torch.arange(int(kept.sum()))[None] if compact else given["position_ids"][..., kept]
        if given.get("visual_pos_masks") is not None:
            rows = kept[given["visual_pos_masks"][0]]
            given["deepstack_visual_embeds"] = [features[rows] for features in given["deepstack_visual_embeds"]]
        for name in ("inputs_embeds", "attention_mask", "visual_pos_masks", "moe_mm_token_type_ids"):
            if given.get(name) is not None:
                given[name] = given[name][:, kept]
        return args, given

    hook = model.get_decoder().register_forward_pre_hook(take_out, with_kwargs=True)
    try:
        return _greedy(model, batch, steps)
    finally:
        hook.remove()


def hidden(model: PreTrainedModel, batch: dict[str, Any], dropped: Tensor, behind: int, steps: int = 6) -> Tensor:
    """The same with all rows in place, where layers behind ``behind`` do not see the keys of the dropped ones."""
    with hiding(model, dropped, behind):
        return _greedy(model, batch, steps)


def left_behind(model: PreTrainedModel, batch: dict[str, Any], dropped: Tensor, behind: int, steps: int = 6) -> Tensor:
    """The same where the rows ``dropped`` go on to layer ``behind`` and no further, for layers without keys to hide."""

    def leave(block: object, args: tuple[Any, ...], output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        states = states[:, ~torch.nn.functional.pad(dropped, (0, states.shape[1] - len(dropped)))]
        return (states, *output[1:]) if isinstance(output, tuple) else states

    def fewer(block: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        cos, sin = kwargs["position_embeddings"]
        kept = ~torch.nn.functional.pad(dropped, (0, cos.shape[-2] - len(dropped)))
        changed = {"position_embeddings": (cos[..., kept, :], sin[..., kept, :]), "attention_mask": None}
        return args, kwargs | changed

    layers = layers_of(model)
    hooks = [layers[behind].register_forward_hook(leave)]
    hooks += [layer.register_forward_pre_hook(fewer, with_kwargs=True) for layer in layers[behind + 1 :]]
    try:
        return _greedy(model, batch, steps)
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def _greedy(model: PreTrainedModel, batch: dict[str, Any], steps: int) -> Tensor:
    logits = []
    banned = torch.tensor(model.generation_config.suppress_tokens)
    batch = dict(batch)
    for _ in range(steps):
        logits.append(model(**batch, use_cache=False).logits[0, -1])
        token = logits[-1].index_fill(0, banned, float("-inf")).argmax()[None, None]
        batch["input_ids"] = torch.cat([batch["input_ids"], token], dim=1)
        # a mask of ones, because positions with gaps would be taken for packed sequences without one
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        for name in batch:
            if name.endswith("token_type_ids"):
                batch[name] = torch.nn.functional.pad(batch[name], (0, 1))
    return torch.stack(logits)


def layers_of(model: PreTrainedModel) -> torch.nn.ModuleList:
    """The decoder's layers, also where the decoder is given together with its head."""
    decoder = model.get_decoder()
    return decoder.layers if hasattr(decoder, "layers") else decoder.model.layers


@contextmanager
def hiding(model: PreTrainedModel, dropped: Tensor, behind: int) -> Iterator[None]:
    """Calls inside do not see the keys of the rows ``dropped``, bool [T], in layers behind ``behind``."""

    def hide(layer: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        length = (args[0] if args else kwargs["hidden_states"]).shape[1]
        gone = torch.nn.functional.pad(dropped, (0, length - len(dropped)))
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        visible = causal & (~gone | torch.eye(length, dtype=torch.bool))  # itself, so that no row is empty
        return args, kwargs | {"attention_mask": visible[None, None]}

    hooks = [layer.register_forward_pre_hook(hide, with_kwargs=True) for layer in layers_of(model)[behind + 1 :]]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def last_query(model: PreTrainedModel, given: dict[str, Any], visual: Tensor, layer: int) -> Tensor:
    """FlowCut's second score of each visual row, float64 [number of them], after ``layer`` of a Llama-like decoder that
    is called with ``given``, one row without padding, of which ``visual``, bool [T], are visual tokens."""
    seen: dict[str, Any] = {}

    def record(module: object, args: object, kwargs: dict[str, Any]) -> None:
        seen.update(kwargs)

    attention = model.get_decoder().layers[layer].self_attn
    hook = attention.register_forward_pre_hook(record, with_kwargs=True)
    mask = torch.ones(given["inputs_embeds"].shape[:2], dtype=torch.long)
    model.get_decoder()(**given, attention_mask=mask, use_cache=False)
    hook.remove()
    rows, (cos, sin) = seen["hidden_states"][0], (part[0].double() for part in seen["position_embeddings"])
    query, key, value = (
        project(rows).view(len(rows), -1, attention.head_dim).double()
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )

    def turned(states: Tensor) -> Tensor:
        first, second = states.chunk(2, dim=-1)
        return states * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]

    query, key = turned(query), turned(key)
    copies = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(copies, dim=1) for states in (key, value))
    relation = torch.zeros(int(visual.sum()), dtype=torch.float64)
    semantics = torch.zeros_like(relation)
    for head in range(query.shape[1]):
        relation += (key[visual, head] @ query[-1, head] / attention.head_dim**0.5).softmax(0) / query.shape[1]
        semantics += (value[visual, head] @ value[-1, head] / attention.head_dim**0.5).softmax(0) / query.shape[1]
    return (relation + semantics) * value[visual].mean(1).abs().sum(-1)


def zipped_layer(model: PreTrainedModel, image: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """Of the layer whose output a LLaVA uses, class token first: its output [1 + n, C], query and key [1 + n, h, d] in
    float64, and the scale of its attention."""
    tower = model.base_model.vision_tower
    hidden = tower.pre_layrnorm(tower.embeddings(image[None]))
    for layer in tower.encoder.layers[:-2]:
        hidden = layer(hidden, None)
    layer = tower.encoder.layers[-2]
    attention, inside = layer.self_attn, layer.layer_norm1(hidden)[0]
    heads = (len(inside), attention.num_heads, attention.head_dim)
    query, key = (project(inside).view(heads).double() for project in (attention.q_proj, attention.k_proj))
    return layer(hidden, None)[0].double(), query, key, attention.scale


def published_visionzip(
    model: PreTrainedModel, image: Tensor, dominant: int, contextual: int
) -> tuple[Tensor, list[int], list[int]]:
    """The released procedure on one LLaVA image [3, H, W]: features [kept, C] in the order in which the language model
    gets them, and the dominant and contextual ones among the rows of the tower, whose first is the class token."""
    rows, query, key, scale = zipped_layer(model, image)
    attention = torch.einsum("hd,nhd->hn", scale * query[0], key).softmax(-1)
    best = attention[:, 1:].sum(0).topk(dominant - 1).indices + 1
    taken = torch.zeros(len(rows), dtype=torch.bool).index_fill(0, torch.cat([torch.tensor([0]), best]), True)
    rest = (~taken).nonzero()[:, 0]
    metric = torch.nn.functional.normalize(key.mean(1)[rest], dim=-1)
    targets = torch.arange(0, len(rest), max(1, len(rest) // contextual))[:contextual]
    others = torch.tensor([place for place in range(len(rest)) if place not in targets.tolist()])
    joins = (metric[others] @ metric[targets].T).argmax(-1)
    merged = []
    for number, target in enumerate(targets.tolist()):
        mine = rows[rest[others[joins == number]]]
        merged.append(rows[rest[target]] + mine.sum(0) / max(1, len(mine)))
    features = torch.cat([rows[taken], torch.stack(merged)]).to(image.dtype)
    return model.base_model.multi_modal_projector(features), taken.nonzero()[:, 0].tolist(), rest[targets].tolist()


def visionzip(model: PreTrainedModel, image: Tensor, dominant: int, contextual: int) -> tuple[Tensor, Tensor]:
    """Features [kept, C] of one LLaVA image [3, H, W] and which patches they stand for, ascending, of the variant
    without a class token; the grouping in float64, from the input of the layer whose output is used."""
    holder = model.base_model
    rows, query, key, scale = zipped_layer(model, image)
    rows = rows[1:]
    paid = [float(x) for x in torch.einsum("hd,nhd->hn", query[0] * scale, key).softmax(-1).mean(0)[1:]]
    order = sorted(range(len(paid)), key=lambda patch: -paid[patch])
    best, rest = sorted(order[:dominant]), sorted(order[dominant:])
    stretch = len(rest) / contextual
    targets = [rest[int((place + 0.5) * stretch)] for place in range(contextual)]
    groups: dict[int, list[int]] = {target: [target] for target in targets}
    mean_key = key.mean(1)[1:]
    for patch in set(rest) - set(targets):
        alike = [float(torch.cosine_similarity(mean_key[patch], mean_key[target], dim=0)) for target in targets]
        groups[targets[alike.index(max(alike))]].append(patch)
    kept = sorted(best + targets)
    merged = [rows[groups.get(patch, [patch])].mean(0) for patch in kept]
    return holder.multi_modal_projector(torch.stack(merged).to(image.dtype)), torch.tensor(kept)


def flowcut(
    model: PreTrainedModel, image: Tensor, budget: int, every: int = 2, tower_name: str = "vision_tower"
) -> tuple[Tensor, list[int]]:
    """The published procedure on the CLIP tower of one LLaVA image [3, H, W], layer by layer, scores in float64: kept
    patches, ascending, and how many were left after each layer."""
    tower = getattr(model.base_model, tower_name)
    hidden = tower.pre_layrnorm(tower.embeddings(image[None]))
    kept, accumulated, sizes = torch.arange(hidden.shape[1] - 1), None, []
    last = len(tower.encoder.layers) - 3
    for index, layer in enumerate(tower.encoder.layers[: last + 1]):
        attention, inside = layer.self_attn, layer.layer_norm1(hidden)[0]
        shape = (len(inside), attention.num_heads, attention.head_dim)
        query, key, value = (
            project(inside).view(shape).transpose(0, 1).double()
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        relation = ((query[:, :1] @ key.mT) * attention.scale).softmax(-1)[:, 0].mean(0)[1:]
        semantics = (value[:, :1] @ value.mT).softmax(-1)[:, 0].mean(0)[1:]
        density = value.mean(0).abs().sum(-1)[1:]
        now = (relation / relation.sum() + semantics / semantics.sum()) * density
        accumulated = now if accumulated is None else 0.5 * accumulated + 0.5 * now
        hidden = layer(hidden, None)
        left, to_go = len(kept), last - index
        if to_go % every == 0 and left > budget:
            share = relation / relation.sum()
            spread = float(-(share * share.log()).sum() / torch.tensor(float(left)).log())
            cut = left - budget if to_go == 0 else round((left - budget) / to_go**0.5 * (1 - spread**2))
            best = accumulated.topk(max(left - cut, budget)).indices.sort().values
            kept, accumulated = kept[best], accumulated[best]
            hidden = torch.cat([hidden[:, :1], hidden[:, 1:][:, best]], dim=1)
        sizes.append(len(kept))
    return kept, sizes
