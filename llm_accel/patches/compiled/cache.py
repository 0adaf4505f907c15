"""The cache that a compiled decode step sees: the session's own layers in their fixed form."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.cache_utils import Cache

from llm_accel.cache import AccelLayer, GroupedLayer
from llm_accel.cache.attention import Attention
from llm_accel.cache.fixed import FixedForm, together
from llm_accel.cache.linear import LinearLayer, states_of
from llm_accel.patches.compiled.pool import Buffers, Pool
from llm_accel.patches.compiled.sizes import Sizes
from llm_accel.patches.vision.head_scaling import scaled
from llm_accel.patches.vision.state import VisualState

if TYPE_CHECKING:
    from llm_accel.patches.session import Session

Build = Callable[[int, Any], FixedForm | None]  # the fixed form of a layer, by its index
HEADROOM = 256  # decoded tokens for which there is headroom where nobody has said how many will come


class GraphCache(Cache):
    """What the decoder is given in place of cache and session. Python values in it are constants.

    Attributes:
        seen: logical length, int64 []; models whose callers leave out ``position_ids`` count from it.
        visual: that no visual token is under way, for the hooks that ask.
        headroom: tokens that can still be decoded.
        kind: a number for what is constant in its graphs, since that is long and is asked for at every step.
    """

    def __init__(self, session: Session, buffers: Buffers, headroom: int, pool: Pool, build: Build) -> None:
        super().__init__(layers=[*session.layers])
        self.headroom, self.kind = headroom, buffers.kind
        self._buffers, self._pool = buffers, pool
        self._fixed: list[AccelLayer | LinearLayer] = []
        layers: list[Any] = session.layers
        try:
            for index, layer in enumerate(layers):
                form = buffers.form(index, partial(build, index, layer))
                if form is not None:
                    self._fixed.append(layer)
                    layer.fix(form)
        except BaseException:  # no session knows of this one yet, which could end it
            self._unfix()
            raise
        self.seen, self.visual = buffers.seen, VisualState()

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """The logical length as a tensor: a number would be a constant of the graph."""
        return self.seen

    @property
    def whole(self) -> bool:
        """Whether all layers are still in their fixed form; reading the entries of one ends it."""
        return all(layer.is_fixed for layer in self._fixed)

    def lies_in(self, pool: Pool) -> bool:
        """Whether the buffers are of this pool; those of another model, of which this one is a copy, are not."""
        return self._pool is pool

    def begin(self) -> Hashable:
        """What tells the graph of the next step from those of others; Python values of the layers are set for it."""
        return tuple(layer.begin_step() for layer in self._fixed)

    def advance(self) -> None:
        """The graph has added one token to every layer."""
        for layer in self._fixed:
            layer.end_step()
        self.headroom -= 1

    def backup(self) -> Callable[[], None]:
        """Call the result to undo a step that failed half-way."""
        return together([layer.backup() for layer in self._fixed])

    def end(self) -> None:
        """Ends the fixed form of all layers; the buffers may serve another cache."""
        self._unfix()
        self._pool.put(self._buffers)

    def _unfix(self) -> None:
        for layer in self._fixed:
            layer.unfix()

    def attend(self, index: int, attention: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of one layer, [B, 1, Hq, Dv]."""
        layer: Any = self.layers[index]
        output: Tensor = layer.attend_fixed(attention, query, key, value)
        return output if layer.factors is None else scaled(output, layer.factors)


def fixed(session: Session, decoder: Any, pool: Pool) -> GraphCache:
    """The session's layers in their fixed form, for all the tokens that were announced."""
    sizes = Sizes(session.plan, decoder, session.headroom or HEADROOM)
    specs = {index: sizes.of(index, layer) for index, layer in session.ours.items()}
    states = tuple((name, *state.shape, state.dtype) for it in session.layers for name, state in states_of(it).items())
    key = (tuple((type(session.ours[index]), spec) for index, spec in specs.items()), states)

    def form(index: int, layer: Any) -> FixedForm | None:
        if isinstance(layer, GroupedLayer):
            return layer.allocate_parts(specs[index])
        if isinstance(layer, AccelLayer):
            return layer.allocate(specs[index][0])
        return layer.allocate() if isinstance(layer, LinearLayer) else None

    return GraphCache(session, pool.take(key), sizes.headroom, pool, form)
