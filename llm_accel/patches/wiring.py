"""How a decoder's attention is wired to its cache: found by one forward pass over a few tokens and one over
one more.

What a method evicts is chosen and gathered entry by entry. That is right only where attention is given what the cache
holds, once per layer; :func:`wiring_of` tells whether that is so, for any architecture.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicCache, DynamicLayer, LinearAttentionAndFullAttentionLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from llm_accel.cache.linear import state_bytes
from llm_accel.cache.stock import is_full
from llm_accel.patches.cache_name import CACHE

_NAME = "llm_accel_wiring"
_TOKENS = 12  # enough for each head to have marks of its own
_MARKS = 0x9D7  # odd, so that its multiples differ; no rotation or reversal of its bits gives the same bits
_FAR = 2**20  # a distance that no window reaches


@dataclass(frozen=True)
class Entry:
    """What a cache layer stores of one token of one row.

    Attributes:
        heads: KV heads.
        nbytes: bytes of the keys and values of all of them.
    """

    heads: int
    nbytes: int


@dataclass(frozen=True)
class Wiring:
    """What was found.

    Attributes:
        readers: layer -> the earlier layer whose entries its attention reads, where it keeps none of its own.
        derived: layer whose attention is given what is computed from the cached entries, one by one, not these -> KV
            heads in its cache.
        problem: why no entry of this decoder may be evicted, or None.
        entries: layer -> what its cache stores of a token, sliding windows included.
        states: layer -> bytes of its linear-attention state of one row.
    """

    readers: Mapping[int, int] = field(default_factory=dict)
    derived: Mapping[int, int] = field(default_factory=dict)
    problem: str | None = None
    entries: Mapping[int, Entry] = field(default_factory=dict)
    states: Mapping[int, int] = field(default_factory=dict)

    def sources(self) -> frozenset[int]:
        """Layers whose entries others read too."""
        return frozenset(self.readers.values())


_known: weakref.WeakKeyDictionary[nn.Module, Wiring] = weakref.WeakKeyDictionary()


def wiring_of(decoder: Any) -> Wiring:
    """The wiring of a decoder; worked out once for each instance, but for problems, which may pass. Weights, modes,
    configuration, and whatever a call assigns to the attributes of a module, stay as they are."""
    found = _known.get(decoder)
    if found is None:
        found = _find(decoder)
        if found.problem is None:
            _known[decoder] = found
    return found


class _Unwired(Exception):
    """Raised inside the trial call where the decoder does what no method can follow; the message says what."""


def _find(decoder: Any) -> Wiring:
    trial = _Trial()
    try:
        with torch.no_grad(), _running(decoder):
            layers = _call(decoder, trial)
            trial.check()
            if trial.derived and _device(decoder).type != "meta":  # without weights there are no values to follow
                trial.marking = True
                _call(decoder, trial)
    except _Unwired as error:
        return Wiring(problem=str(error))
    except Exception as error:
        said = ": ".join(filter(None, [type(error).__name__, *str(error).strip().splitlines()[:1]]))
        return Wiring(problem=f"a call of its decoder with a DynamicCache fails ({said.rstrip('.')})")
    entries = {index: entry for index, layer in enumerate(layers) if (entry := _entry(layer)) is not None}
    states = {index: count for index, layer in enumerate(layers) if (count := state_bytes(layer))}
    return Wiring(dict(trial.readers), dict(trial.derived), entries=entries, states=states)


def _entry(layer: Any) -> Entry | None:
    """Of a cache layer with some tokens of one row; None where it holds no keys."""
    keys = getattr(layer, "keys", None)
    if not isinstance(keys, Tensor) or keys.ndim != 4 or keys.shape[2] == 0:
        return None
    heads, held = keys.shape[1], keys.shape[2]
    return Entry(heads, sum(part.numel() * part.element_size() for part in (layer.keys, layer.values)) // held)


@contextmanager
def _running(decoder: Any) -> Iterator[None]:
    """The decoder in eval mode and uncompiled, with attention that computes nothing. Nobody else sees it: the
    configuration, which other models may share, is a copy meanwhile, and no method of a module is called for it."""
    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, _mask)
    own, ours = decoder.config, copy.copy(decoder.config)
    ours._attn_implementation_internal = _NAME
    before = [(module, dict(vars(module)), dict(module._buffers)) for module in decoder.modules()]
    try:
        for module, attributes, _ in before:
            held = vars(module)
            held["training"] = False
            held.pop("_compiled_call_impl", None)
            held.update({name: ours for name, value in attributes.items() if value is own})
        yield
    finally:
        for module, attributes, buffers in before:
            for held, kept in ((vars(module), attributes), (module._buffers, buffers)):
                for name in held.keys() - kept.keys():
                    del held[name]
                held.update(kept)


def _device(decoder: Any) -> torch.device:
    """Where token ids go: to the weights; "meta" for a model without any, whose shapes are all there is to follow."""
    devices = {parameter.device for parameter in decoder.parameters()}
    real = next((device for device in devices if device.type != "meta"), None)
    offloaded = any(hasattr(module, "_hf_hook") for module in decoder.modules())
    return real or torch.device("cpu" if offloaded or not devices else "meta")


def _call(decoder: Any, trial: _Trial) -> list[Any]:
    """Some tokens, then one more, as a prompt and a decode step are; the layers of the cache."""
    cache = DynamicCache(config=decoder.config)
    trial.watch(cache)
    device = _device(decoder)
    shapes_only = device.type == "meta"  # hybrids ask whether a mask hides anything, which has no answer there
    for length, past in ((_TOKENS, 0), (1, _TOKENS)):
        trial.begin()
        decoder.forward(  # the hooks on it are meant for calls of its user
            input_ids=torch.ones(1, length, dtype=torch.long, device=device),
            attention_mask=None if shapes_only else torch.ones(1, past + length, dtype=torch.long, device=device),
            use_cache=True,
            llm_accel=trial,
            **{CACHE: cache},
        )
    return cache.layers


class _WatchedLayer(DynamicLayer):
    """Keeps what it returned, and has the length that our own layers show to mask functions.

    Attributes:
        index: index of the layer.
        trial: what watches it.
        given: keys and values as it returned them in this call; None before.
    """

    index: int
    trial: _Trial
    given: tuple[Tensor, Tensor] | None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if self.given is not None:
            raise _Unwired(f"layer {self.index} adds to its cache twice in one call")
        keys, values = super().update(key_states, value_states)
        if self.trial.marking:
            keys, values = _marked(keys), _marked(values)
        self.given = keys, values
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return 0, 0


class _WatchedHybridLayer(_WatchedLayer, LinearAttentionAndFullAttentionLayer):  # type: ignore[misc,override]
    """The same beside a linear-attention state."""


def _marked(entries: Tensor) -> Tensor:
    """Entries of the shape of ``entries`` [B, H, S, D], all alike but for NaN in some of them: for each head others."""
    heads, slots, width = entries.shape[1:]
    head, slot = (torch.arange(count, device=entries.device) for count in (heads, slots))
    marks = ((head[:, None] + 1) * _MARKS >> slot) & 1 == 1
    alike = torch.linspace(1.0, 2.0, width, dtype=entries.dtype, device=entries.device).expand_as(entries)
    return alike.masked_fill(marks[..., None], torch.nan)


class _Trial:
    """Follows the entries of each layer into attention. Opaque, as sessions are.

    Attributes:
        marking: whether entries are marked instead of compared.
        readers, derived: as in :class:`Wiring`.
    """

    def __init__(self) -> None:
        self.marking = False
        self.readers: dict[int, int] = {}
        self.derived: dict[int, int] = {}
        self._layers: dict[int, _WatchedLayer] = {}
        self._seen: dict[int, list[nn.Module]] = {}

    def watch(self, cache: DynamicCache) -> None:
        """Watches all layers of an empty cache on which a method could act."""
        self._layers = {}
        layers: list[Any] = cache.layers
        for index, layer in enumerate(layers):
            if is_full(layer):
                kind = _WatchedLayer if type(layer) is DynamicLayer else _WatchedHybridLayer
                layer.__class__ = kind
                layer.index, layer.trial, layer.given = index, self, None
                self._layers[index] = layer

    def begin(self) -> None:
        """Another call follows."""
        for layer in self._layers.values():
            layer.given = None
        self._seen = {index: [] for index in self._layers}

    def attend(self, module: nn.Module, key: Tensor, value: Tensor, mask: Tensor | None, kwargs: Any) -> None:
        """One call of an attention function."""
        index: int | None = getattr(module, "layer_idx", None)
        layer = next((one for one in self._layers.values() if one.given and one.given[0] is key), None)
        layer = layer or self._layers.get(-1 if index is None else index)
        if layer is None:
            return  # attention over something else, which stays as it is
        if layer.given is None:
            raise _Unwired(f"the attention of layer {layer.index} comes before its keys are in the cache, or without")
        if mask is not None:
            raise _Unwired(f"layer {layer.index} adds something of its own to the causal mask")
        if kwargs.get("position_bias") is not None:
            raise _Unwired(f"layer {layer.index} adds a bias for each position to its attention")
        if kwargs.get("is_causal") is False:
            raise _Unwired(f"layer {layer.index} attends in both directions")
        self._compare(layer, key, value)
        self._count(layer.index, module, index)

    def _compare(self, layer: _WatchedLayer, key: Tensor, value: Tensor) -> None:
        assert layer.given is not None
        pairs = list(zip((key, value), layer.given, strict=True))
        if not self.marking and any(given is not cached for given, cached in pairs):
            self.derived[layer.index] = layer.given[0].shape[1]
        if self.marking and not all(_keeps_marks(given, cached) for given, cached in pairs):
            raise _Unwired(f"layer {layer.index} rearranges keys or values after they went through its cache")
        if self.marking and not all(_is_alike(given) for given, _ in pairs):
            raise _Unwired(f"what layer {layer.index} makes of an entry of its cache depends on the place of the entry")

    def _count(self, index: int, module: nn.Module, own: int | None) -> None:
        earlier = self._seen[index]
        if any(module is other for other in earlier):
            raise _Unwired(f"layer {index} computes attention more than once over the same keys")
        if earlier:
            if own is None or own in self._layers:
                raise _Unwired(f"the keys of layer {index} are read by more than one layer, one of which has its own")
            self.readers[own] = index
        earlier.append(module)

    def check(self) -> None:
        """After a call: every watched layer must have been seen."""
        for index, layer in self._layers.items():
            if layer.given is None:
                raise _Unwired(f"its layer {index} puts no keys and values into the cache")
            if not self._seen[index]:
                raise _Unwired(f"the attention of layer {index} does not go through transformers' AttentionInterface")


def _keeps_marks(given: Tensor, cached: Tensor) -> bool:
    """Whether each entry of ``given`` depends on the one of ``cached`` that stands in its place, and on no other."""
    marks, wanted = given.isnan().any(-1), cached.isnan().any(-1)
    if marks.ndim != 3 or marks.shape[1] % wanted.shape[1] or marks.shape[2:] != wanted.shape[2:]:
        return False
    return torch.equal(marks, wanted.repeat_interleave(marks.shape[1] // wanted.shape[1], dim=1))


def _is_alike(given: Tensor) -> bool:
    """Whether the entries of each head that are not marked are the same, rounding aside."""
    most, least = given.nan_to_num(-torch.inf).amax(2), given.nan_to_num(torch.inf).amin(2)
    apart = (most - least).masked_fill(most < least, 0)  # a head whose entries are all marked
    size = given.nan_to_num().abs().amax((2, 3))[..., None]
    return bool((apart <= 16 * torch.finfo(given.dtype).eps * size).all())


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    llm_accel: _Trial | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Notes the call and returns zeros, [B, T, Hq, Dv]."""
    if llm_accel is None:
        raise _Unwired(
            f"{type(module).__name__} calls attention without the keyword arguments that its decoder was given"
        )
    llm_accel.attend(module, key, value, attention_mask, kwargs)
    return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """None where a layer of ours stands and the mask is plainly causal; where more is asked for, one that shows."""
    length = kwargs.get("kv_length")
    if not (isinstance(length, int) and length == 0):
        return ALL_MASK_ATTENTION_FUNCTIONS["eager"](*args, **kwargs)  # type: ignore[no-any-return]
    plain = not kwargs.get("use_vmap") and kwargs.get("allow_is_causal_skip", True) and _unbounded(kwargs)
    return None if plain else torch.zeros(1, 1, kwargs["q_length"], 1, device=kwargs.get("device"))


def _unbounded(kwargs: dict[str, Any]) -> bool:
    """Whether a query sees keys at any distance before it."""
    function = kwargs.get("mask_function")
    if function is None:
        return True
    zero = torch.zeros((), dtype=torch.long, device="cpu")  # whatever the default device is
    return bool(function(zero, zero, zero + _FAR, zero))
