"""Linear-attention states: rows of them are moved, saved and joined with the entries of a cache, and nothing else."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionCacheLayerMixin, LinearAttentionLayer

from llm_accel.cache.autograd_modes import thawed
from llm_accel.cache.fixed import FixedForm, restoring
from llm_accel.cache.layer import AccelLayer
from llm_accel.cache.stock import has_linear_state

_KINDS = ("conv", "recurrent")
_PREFIX = "linear."


def beside_state(layer: AccelLayer, stock: Any) -> AccelLayer:
    """``layer``, with the linear-attention state that ``stock`` has beside its entries, if it has one."""
    if not has_linear_state(stock):
        return layer
    kind = _hybrid(type(layer))
    both = kind.__new__(kind)
    LinearAttentionLayer.__init__(both, number_of_states=stock.number_of_states)  # type: ignore[arg-type]
    both.__dict__.update(layer.__dict__)
    return both


def own_state(stock: Any) -> Any:
    """An empty layer that holds nothing but a linear-attention state as one of ours; any other layer itself."""
    return LinearLayer(stock.number_of_states) if type(stock) is LinearAttentionLayer else stock


def state_bytes(layer: Any) -> int:
    """Bytes of the linear-attention state of a cache layer; 0 where it has none."""
    return sum(tensor.nbytes for tensor in states_of(layer).values())


def has_seen_tokens(layer: Any) -> bool:
    """Whether the linear-attention state of a cache layer, if it has one, has seen any."""
    return has_linear_state(layer) and any(layer.has_previous_state.values())


def may_be_ahead(layer: Any) -> bool:
    """Whether a call that failed may have left something in this layer which its length does not show."""
    if isinstance(layer, AccelLayer) and layer.reading is not None:
        return True
    stock = not isinstance(layer, AccelLayer) and getattr(layer, "keys", None) is not None
    return has_seen_tokens(layer) or (stock and layer.get_seq_length() > 0)


def states_of(layer: Any) -> dict[str, Tensor]:
    """The tensors of a linear-attention state by name; empty where the layer has none, or none yet."""
    if not has_linear_state(layer):
        return {}
    held = ((kind, index, state) for kind in _KINDS for index, state in getattr(layer, f"{kind}_states").items())
    return {f"{_PREFIX}{kind}.{index}": state for kind, index, state in held if state is not None}


def restore_states(layer: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fills the state of an empty layer from :func:`states_of`; returns the tensors that belong to something else."""
    rest = {}
    for name, tensor in tensors.items():
        if not name.startswith(_PREFIX):
            rest[name] = tensor
            continue
        kind, index = _place(name)
        state: dict[str, Any] = {f"{kind}_states": tensor, "state_idx": index}
        LinearAttentionLayer.lazy_initialization(layer, **state)
        getattr(layer, f"{kind}_states")[index].copy_(tensor)
        layer.has_previous_state[index] = True
    return rest


def join_states(layer: Any, parts: Sequence[Any]) -> None:
    """Fills the state of an empty layer with the rows of ``parts``."""
    states = [states_of(part) for part in parts]
    restore_states(layer, {name: torch.cat([one[name] for one in states]) for name in states[0]})


def _place(name: str) -> tuple[str, int]:
    """Kind and index of a state of :func:`states_of`."""
    kind, index = name.removeprefix(_PREFIX).split(".")
    return kind, int(index)


class LinearLayer(LinearAttentionLayer):
    """A linear-attention state whose rows can be repeated and selected. In its fixed form it lies in buffers whose
    addresses never change, and compiled decode steps update it in place.

    Attributes:
        fixed: the fixed form, else None.
    """

    fixed: FixedForm | None = None

    def allocate(self) -> FixedForm:
        """Empty buffers for the fixed form."""
        return FixedForm({name: torch.zeros_like(state) for name, state in states_of(self).items()})

    def fix(self, form: FixedForm) -> None:
        """Puts the state into the buffers of ``form``."""
        for name, state in states_of(self).items():
            form.tensors[name].copy_(state)
        self.fixed = form
        self._hold(form.tensors)

    def unfix(self) -> None:
        """Ends the fixed form, if the state is in it: it gets storage of its own again."""
        if self.fixed is not None:
            self.fixed = None
            _map_states(self, torch.clone)

    def _hold(self, states: dict[str, Tensor]) -> None:
        for name, state in states.items():
            kind, index = _place(name)
            getattr(self, f"{kind}_states")[index] = state

    @property
    def is_fixed(self) -> bool:
        """Whether the state is in its fixed form."""
        return self.fixed is not None

    def begin_step(self) -> Hashable:
        """Nothing changes from step to step but what lies in tensors."""
        return None

    def end_step(self) -> None:
        """Nothing to count."""

    def backup(self) -> Callable[[], None]:
        """Call the result to undo a step that failed half-way."""
        assert self.fixed is not None
        return restoring(self.fixed.all())

    def __getstate__(self) -> dict[str, Any]:
        self.unfix()
        return self.__dict__

    def thaw(self) -> None:
        """Makes states of a call in inference mode usable in a call outside of it; buffers are."""
        if self.fixed is None:
            _map_states(self, thawed)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorders rows, for beam search."""
        _map_states(self, lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row ``repeats`` times."""
        _map_states(self, lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps only the given rows."""
        _map_states(self, lambda rows: rows[indices.to(rows.device)])


class _BesideState(LinearLayer):
    """In front of a cache layer of ours: calls that concern rows reach both, all others the one they are for."""

    is_compileable = False

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Positional: keys and values; by name: a state."""
        if args:
            _entries(self).lazy_initialization(*args)
        else:
            super().lazy_initialization(**kwargs)

    def thaw(self) -> None:
        """Makes tensors of a call in inference mode usable in a call outside of it."""
        LinearLayer.thaw(self)
        _entries(self).thaw()

    def reset(self) -> None:
        """Forgets everything; the layer can be filled again."""
        LinearLayer.reset(self)
        _entries(self).reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorders rows, for beam search."""
        LinearLayer.reorder_cache(self, beam_idx)
        _entries(self).reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row ``repeats`` times."""
        LinearLayer.batch_repeat_interleave(self, repeats)
        _entries(self).batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps only the given rows."""
        LinearLayer.batch_select_indices(self, indices)
        _entries(self).batch_select_indices(indices)

    def select_rows(self, rows: Tensor, padding: int) -> None:
        """Keeps ``rows``, int64 [n], and lets go of what only others had."""
        LinearLayer.batch_select_indices(self, rows)
        _entries(self).select_rows(rows, padding)

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the newest tokens, where the state allows it."""
        LinearLayer.crop(self, tokens_to_remove)
        _entries(self).crop(tokens_to_remove)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything the layer holds."""
        tensors, values = _entries(self).state()
        return tensors | states_of(self), values

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Fills an empty layer with what :meth:`state` gave."""
        _entries(self).restore(restore_states(self, tensors), values)

    def join(self, parts: Sequence[Self], length: int) -> None:
        """Fills an empty layer with the rows of ``parts``."""
        _entries(self).join(parts, length)
        join_states(self, parts)


def _entries(layer: _BesideState) -> Any:
    """The part of a layer that holds entries: the class that follows the linear-attention classes."""
    return super(LinearAttentionCacheLayerMixin, layer)


def _map_states(layer: LinearLayer, change: Callable[[Tensor], Tensor]) -> None:
    layer.unfix()
    for kind in _KINDS:
        states = getattr(layer, f"{kind}_states")
        for index, state in states.items():
            states[index] = None if state is None else change(state)


@functools.cache
def _hybrid(kind: type[AccelLayer]) -> type[AccelLayer]:
    """``kind`` with a linear-attention state beside its entries."""
    return type(f"Hybrid{kind.__name__}", (_BesideState, kind), {})
