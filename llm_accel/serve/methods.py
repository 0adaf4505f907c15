"""Which methods are on the model: one set at a time, and those of other requests ready to be put on again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from transformers import DynamicCache

from llm_accel.api import Handle, apply
from llm_accel.errors import UnsupportedModelError
from llm_accel.methods import Dense, MethodConfig
from llm_accel.patches.install import hook_of, suspend
from llm_accel.patches.plan import Plan
from llm_accel.patches.rows import stock_rows

Methods = tuple[MethodConfig, ...]

_READY = 16  # sets of methods that are kept ready


class AppliedMethods:
    """Used by the inference thread alone.

    Attributes:
        plain: what the dense model is run as: a method that keeps everything, so that prompts can be read a few at a
            time and rows come and go; none where that does not work on this model.
    """

    def __init__(self, model: Any, decode: Any) -> None:
        self._model, self._decode = model, decode
        self._now: Methods = ()
        self._handles: OrderedDict[Methods, Handle] = OrderedDict()
        self._resume: dict[Methods, Callable[[], None]] = {}
        self.plain: Methods = (Dense(),)
        try:
            self.use(self.plain)
        except UnsupportedModelError:
            self.plain = ()

    def use(self, methods: Methods) -> Handle | None:
        """Puts these methods on the model and takes others off; None for the model without a plug-in.

        Raises:
            LlmAccelError: they do not work on this model, which is without a plug-in then.
        """
        if methods != self._now:
            self.rest()
            if methods in self._resume:
                self._resume.pop(methods)()
            elif methods:
                self._handles[methods] = apply(self._model, methods, decode=self._decode)
            self._now = methods
        if methods:
            self._handles.move_to_end(methods)
            if len(self._handles) > _READY:
                self._resume.pop(self._handles.popitem(last=False)[0])
        return self._handles.get(methods)

    @property
    def joins(self) -> bool:
        """Whether caches of what is on the model now can be joined, and prompts be read in chunks."""
        return (
            self._handles[self._now].can_prefill if self._now else stock_rows(DynamicCache(config=self._model.config))
        )

    def rest(self) -> None:
        """The model is as it was before the first request."""
        hook = hook_of(self._model) if self._now else None
        if hook is not None:
            self._resume[self._now] = suspend(self._model, hook)
        self._now = ()

    @property
    def plan(self) -> Plan | None:
        """What the methods that are on the model do to it."""
        hook = hook_of(self._model) if self._now else None
        return None if hook is None else hook.plan
