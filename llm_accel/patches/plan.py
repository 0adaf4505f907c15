"""What the applied methods do to one model: worked out once, before anything is touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from llm_accel.errors import ConfigError
from llm_accel.methods import (
    Attend,
    Depth,
    HeadMask,
    HeadMethod,
    HeadSplit,
    LayerCut,
    MethodConfig,
    ScoreAndKeep,
    StepEviction,
    VisualTokens,
)
from llm_accel.patches.families import VisionFamily
from llm_accel.patches.layers import (
    AccelLayer,
    AttendingLayer,
    GroupedLayer,
    HidingLayer,
    RaggedLayer,
    RelativeSlotLayer,
    SlotLayer,
)


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
        kv_heads: KV heads of a layer, where heads are split.
        family: what is declared of the model's family, where visual tokens are taken out.
        keeper: the method that decides which KV entries stay, if any; worked out from ``configs``.
        attender: the method that computes attention, if any; worked out from ``configs``.
        tokens: the method that decides which visual tokens reach the decoder, if any; worked out from ``configs``.
        cut: the method that decides which of them leave it half-way, if any; worked out from ``configs``.
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
    family: VisionFamily | None = None
    keeper: ScoreAndKeep | None = field(init=False, compare=False)
    attender: Attend | None = field(init=False, compare=False)
    tokens: VisualTokens | None = field(init=False, compare=False)
    cut: LayerCut | None = field(init=False, compare=False)
    _depths: Mapping[int, tuple[Depth, Depth]] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        acting = [layer for layer in range(self.layers) if layer not in self.skipped]
        places = [
            (Depth(rank, len(acting), later=False), Depth(rank, len(acting), later=True)) for rank in range(len(acting))
        ]
        keeper = next((config for config in self.configs if isinstance(config, ScoreAndKeep)), None)
        attender = next((config for config in self.configs if isinstance(config, Attend)), None)
        tokens = next((config for config in self.configs if isinstance(config, VisualTokens)), None)
        object.__setattr__(self, "keeper", keeper)
        object.__setattr__(self, "tokens", tokens)
        object.__setattr__(self, "cut", next((config for config in self.configs if isinstance(config, LayerCut)), None))
        object.__setattr__(self, "attender", attender)
        object.__setattr__(self, "_depths", dict(zip(acting, places, strict=True)))

    def __deepcopy__(self, memo: dict[int, object]) -> Plan:
        """Itself: it never changes, and compiled code recognises it by identity only."""
        return self

    @property
    def evicts(self) -> bool:
        """Whether entries leave the cache, are treated as if they had, or never enter it."""
        return self.keeper is not None or self.split is not None or self.visual

    @property
    def visual(self) -> bool:
        """Whether visual tokens are taken out."""
        return self.family is not None

    @property
    def hides(self) -> bool:
        """Whether entries are hidden from attention and none leaves the cache."""
        return isinstance(self.keeper, StepEviction) and self.keeper.hides

    def make_layer(self, index: int) -> AccelLayer:
        """An empty cache layer of the kind that the methods need at this index."""
        if self.attender is not None and self.attender.dense_layer(index, self.layers) is None:
            return AttendingLayer(self.attender, index, self.layers)
        if self.split is not None and index not in self.skipped:
            return GroupedLayer(self.split.full[index], self.kv_heads)
        if self.keeper is None or index in self.skipped:
            return AccelLayer()
        if isinstance(self.keeper, StepEviction):
            if self.keeper.hides:
                return HidingLayer()
            kind = RelativeSlotLayer if self.keeper.relative_positions else SlotLayer
            return kind(self.keeper.vacancies)
        return AccelLayer() if self.keeper.page_size is None else RaggedLayer(self.keeper.page_size)

    def depth(self, index: int, later: bool) -> Depth:
        """Where a layer stands among those that the methods act on; ``later``: it has evicted before."""
        return self._depths[index][later]

    @property
    def title(self) -> str:
        """The methods as the command line writes them."""
        return " + ".join(config.spec() for config in self.configs)


def check_composition(configs: Sequence[MethodConfig]) -> None:
    """Raises :class:`ConfigError` where two methods would decide the same thing."""
    if not configs:
        raise ConfigError("method=[] names no method; give at least one.")
    keepers = [config.spec() for config in configs if isinstance(config, ScoreAndKeep)]
    if len(keepers) > 1:
        raise ConfigError(f"{' and '.join(keepers)} both decide which KV entries stay; give one of them.")
    attenders = [config.spec() for config in configs if isinstance(config, Attend)]
    if len(attenders) > 1:
        raise ConfigError(f"{' and '.join(attenders)} both compute attention; give one of them.")
    for config in configs if attenders else ():
        slots = isinstance(config, ScoreAndKeep) and (isinstance(config, StepEviction) or config.page_size is not None)
        if slots:
            raise ConfigError(
                f"{attenders[0]} reads entries in the order of their positions, which the cache of {config.spec()} "
                "does not keep; combine it with a method that compresses the prompt and keeps as many entries in each "
                "head: snapkv, pyramidkv, random."
            )
    choosers = [config.spec() for config in configs if isinstance(config, VisualTokens)]
    if len(choosers) > 1:
        raise ConfigError(
            f"{' and '.join(choosers)} both decide which visual tokens reach the decoder; give one of them."
        )
    cuts = [config.spec() for config in configs if isinstance(config, LayerCut)]
    if len(cuts) > 1:
        raise ConfigError(f"{' and '.join(cuts)} both let visual tokens leave after a layer; give one of them.")
    by_head = [config.spec() for config in configs if isinstance(config, HeadMethod)]
    if by_head and len(configs) > 1:
        raise ConfigError(
            f"{by_head[0]} cannot be combined with {', '.join(c.spec() for c in configs if c.spec() != by_head[0])}; "
            "for SnapKV on the heads that keep everything give full_budget."
        )
