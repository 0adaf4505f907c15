"""What the applied methods do to one model: worked out once, before anything is touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar, get_args

from torch import Tensor

from llm_accel.cache import (
    AccelLayer,
    GeneratedLayer,
    GroupedLayer,
    HidingLayer,
    MarkedLayer,
    RaggedLayer,
    RelativeSlotLayer,
    SlotLayer,
    SparseLayer,
)
from llm_accel.errors import ConfigError, UnsupportedCallError
from llm_accel.methods import (
    WHOLE,
    AttentionMethod,
    Claim,
    Cut,
    Dense,
    Depth,
    EntranceTokens,
    Grounding,
    HeadMask,
    HeadScaling,
    HeadShard,
    HeadSplit,
    LayerCut,
    Lead,
    MethodConfig,
    ScoreAndKeep,
    StepEviction,
    VASparse,
    VisualInput,
    WeightShift,
)
from llm_accel.patches.families import VisionFamily
from llm_accel.patches.steps import SparseAttention

Decode = Literal["eager", "compiled", "auto"]
DECODES: tuple[Decode, ...] = get_args(Decode)
ForImages = VisualInput | EntranceTokens | LayerCut | VASparse | Grounding  # what must know visual tokens


@dataclass(frozen=True)
class Plan:
    """The roles of the applied methods on one model.

    Attributes:
        configs: the applied methods in order.
        layers: number of layers of the text model.
        base: name of the attention implementation that the model had.
        skipped: layer index -> why no method acts on it.
        trace: whether original positions of kept entries are recorded.
        backends: operation -> (backend, reason).
        split: which KV heads keep everything and which a stream, or None.
        mask: which query heads are silenced, or None.
        kv_heads: KV heads of a layer that are here, where heads are split.
        heads: which heads of the layers are here, where several processes share them.
        family: what is declared of the model's family, where a method must know its visual tokens.
        decode: how decode steps were asked to run.
        compiles: whether they run as a compiled graph wherever a call allows it.
        readers: layer -> the earlier layer whose entries its attention reads, where it keeps none of its own.
        derived: layers whose attention is given what is computed from the cached entries (latents), not these.
        head_scaling: the method that scales the outputs of heads, if any acts.
        scaled_layers: the layers in which it does.
        weight_shift: the method that shifts attention between entries, if any acts; with all that it must know of the
            model.
        shifted_layers: the layers in which it does.
        mlp_chunk: tokens that an MLP computes at once; None: all of a call.
        lead: what the model is told before it reads a context again.
        kv_method: the method that decides which KV entries stay, if any; worked out from ``configs``.
        attention_method: the method that computes attention, if any; worked out from ``configs``.
        cut: after which layers visual tokens may leave the decoder, and which of them, or None.
        tokens: the method that decides what of an image reaches the decoder, if any; worked out from ``configs``.
        entrance: the method that decides at the entrance of the decoder which visual tokens enter it, if any; worked
            out from ``configs``.
        decoding: the method that changes how tokens are generated, if any; worked out from ``configs``.
    """

    configs: tuple[MethodConfig, ...]
    layers: int
    base: str
    skipped: Mapping[int, str]
    trace: bool = field(default=False, compare=False)
    backends: Mapping[str, tuple[str, str]] = field(default_factory=dict, compare=False)
    split: HeadSplit | None = None
    mask: HeadMask | None = None
    kv_heads: int = 0
    heads: HeadShard = WHOLE
    readers: Mapping[int, int] = field(default_factory=dict, compare=False)
    derived: frozenset[int] = field(default=frozenset(), compare=False)
    family: VisionFamily | None = None
    cut: Cut | None = field(default=None, compare=False)
    head_scaling: HeadScaling | None = None
    scaled_layers: frozenset[int] = frozenset()
    weight_shift: WeightShift | None = None
    shifted_layers: frozenset[int] = frozenset()
    decode: Decode = field(default="eager", compare=False)
    compiles: bool = field(default=False, compare=False)
    mlp_chunk: int | None = field(default=None, compare=False)
    lead: Lead = field(default_factory=Lead)
    kv_method: ScoreAndKeep | None = field(init=False, compare=False)
    attention_method: AttentionMethod | None = field(init=False, compare=False)
    tokens: VisualInput | None = field(init=False, compare=False)
    entrance: EntranceTokens | None = field(init=False, compare=False)
    decoding: VASparse | None = field(init=False, compare=False)
    _depths: Mapping[int, tuple[Depth, Depth]] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        acting = [layer for layer in range(self.layers) if layer not in self.skipped]
        places = [
            (Depth(rank, len(acting), later=False), Depth(rank, len(acting), later=True)) for rank in range(len(acting))
        ]
        tokens = _first(self.configs, VisualInput)
        if tokens is not None and (self.cut is None or any(isinstance(config, LayerCut) for config in self.configs)):
            tokens = tokens.one_stage()  # another method lets tokens leave between layers, or no layer does
        elif tokens is not None and self.family is not None and self.family.two_stages:
            tokens = tokens.two_stages()
        object.__setattr__(self, "tokens", tokens)
        object.__setattr__(self, "kv_method", _first(self.configs, ScoreAndKeep))
        object.__setattr__(self, "attention_method", _first(self.configs, AttentionMethod))
        object.__setattr__(self, "entrance", _first(self.configs, EntranceTokens))
        object.__setattr__(self, "decoding", _first(self.configs, VASparse))
        object.__setattr__(self, "_depths", dict(zip(acting, places, strict=True)))

    def __deepcopy__(self, memo: dict[int, object]) -> Plan:
        """Itself: it never changes, and compiled code recognises it by identity only."""
        return self

    @property
    def evicts(self) -> bool:
        """Whether entries leave the cache, are treated as if they had, or never enter it."""
        return self.kv_method is not None or self.split is not None or self.visual

    @property
    def visual(self) -> bool:
        """Whether visual tokens are taken out."""
        return self.tokens is not None or self.entrance is not None or self.cut is not None

    @property
    def renumbers(self) -> bool:
        """Whether tokens that stay of images are counted without gaps."""
        return self.tokens is not None and self.tokens.compact_on(1 if self.family is None else self.family.axes)

    @property
    def grounds(self) -> bool:
        """Whether outputs of attention are changed so that they rest more on the image."""
        return self.head_scaling is not None or self.weight_shift is not None

    @property
    def reads_tower(self) -> bool:
        """Whether visual tokens are marked by what the vision tower attends to."""
        return self.weight_shift is not None and self.weight_shift.reads_tower

    @property
    def hides(self) -> bool:
        """Whether entries are hidden from attention and none leaves the cache."""
        return isinstance(self.kv_method, StepEviction) and self.kv_method.hides

    @property
    def whole(self) -> Dense | None:
        """The method that keeps everything, or None."""
        return _first(self.configs, Dense)

    @property
    def capacity(self) -> int:
        """Entries that buffers of compiled decoding have place for at least."""
        return (self.whole.capacity or 0) if self.whole is not None else 0

    @property
    def cut_title(self) -> str:
        """The method that lets visual tokens leave between layers, as the command line writes it; empty without one."""
        cutting = [config for config in self.configs if isinstance(config, LayerCut)]
        return next((config.spec() for config in (*cutting, self.tokens) if config is not None), "")

    def check_lengths(self, lengths: Tensor) -> None:
        """Refuses to decode together after prompts of ``lengths`` tokens, int64 [B], what must not share slots: a layer
        overwrites one number of them, and a part of the prompt is another number in each row.

        Raises:
            UnsupportedCallError: rows of these lengths would keep other entries than they keep alone.
        """
        kv_method = self.kv_method
        if not isinstance(kv_method, StepEviction) or kv_method.ratio is None or kv_method.hides:
            return
        counts = sorted(set(lengths.tolist()))
        if len({kv_method.capacity(count) for count in counts}) > 1:
            raise UnsupportedCallError(
                f"prompts of {counts[0]} to {counts[-1]} tokens in one batch: {kv_method.spec()} keeps a part of each "
                "while decoding, and a layer has the same number of slots for all rows; give budget in place of ratio, "
                "or prompts of equal length."
            )

    def make_layer(self, index: int) -> AccelLayer:
        """An empty cache layer of the kind that the methods need at this index."""
        if self.attention_method is not None and self.attention_method.dense_layer(index, self.layers) is None:
            return SparseLayer(SparseAttention(self.attention_method, index, self.layers, self.heads))
        if self.split is not None and index not in self.skipped:
            return GroupedLayer(self.split.full[index], self.kv_heads)
        if self.decoding is not None and self.decoding.attends:
            return GeneratedLayer()
        plain = MarkedLayer if index in self.shifted_layers else AccelLayer
        if self.kv_method is None or index in self.skipped:
            return plain()
        if isinstance(self.kv_method, StepEviction):
            if self.kv_method.hides:
                return HidingLayer()
            kind = RelativeSlotLayer if self.kv_method.relative_positions else SlotLayer
            return kind(self.kv_method.empty_slots)
        return plain() if self.kv_method.page_size is None else RaggedLayer(self.kv_method.page_size, self.heads)

    def reader_count(self, index: int) -> int:
        """How many later layers read the entries of this one."""
        return sum(source == index for source in self.readers.values())

    def depth(self, index: int, later: bool) -> Depth:
        """Where a layer stands among those that the methods act on; ``later``: it has evicted before."""
        return self._depths[index][later]

    @property
    def title(self) -> str:
        """The methods as the command line writes them."""
        return " + ".join(config.spec() for config in self.configs)


_Role = TypeVar("_Role", bound=MethodConfig)


def _first(configs: Sequence[MethodConfig], role: type[_Role]) -> _Role | None:
    """The method that plays a role; only one does."""
    return next((config for config in configs if isinstance(config, role)), None)


def check_composition(configs: Sequence[MethodConfig]) -> None:
    """Raises :class:`ConfigError` where two methods would decide the same thing."""
    if not configs:
        raise ConfigError("method=[] names no method; give at least one.")
    for claim in Claim:
        claiming = [config for config in configs if claim in config.claims]
        if len(claiming) > 1:
            raise ConfigError(_conflict(claim, *claiming[:2]))


def _conflict(claim: Claim, one: MethodConfig, other: MethodConfig) -> str:
    for config, against in ((one, other), (other, one)):
        if config.claims[claim]:
            return f"{config.spec()} {config.claims[claim].format(other=against.spec())}"
    return f"{one.spec()} and {other.spec()} both {claim.value}; give one of them."
