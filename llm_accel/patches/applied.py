"""Several sets of methods that take turns on one model: one at a time, the others ready to be put on again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from transformers import DynamicCache

from llm_accel.errors import UnsupportedModelError
from llm_accel.methods import Dense, MethodConfig
from llm_accel.patches.auto import chosen_methods
from llm_accel.patches.hook import DecoderHook, attach_session
from llm_accel.patches.install import install, make_plan, suspend
from llm_accel.patches.plan import Plan
from llm_accel.patches.prefill import why_whole
from llm_accel.patches.rows import stock_rows

Methods = tuple[MethodConfig, ...]

_READY = 16  # sets of methods that are kept ready


class AppliedMethods:
    """For one thread.

    Attributes:
        plain: what the dense model is run as: a method that keeps everything, so that prompts can be read a few at a
            time and rows come and go; none where that does not work on this model.
    """

    def __init__(self, model: Any, decode: Any) -> None:
        self._model, self._decode = model, decode
        self._now: Methods = ()
        self._hooks: OrderedDict[Methods, DecoderHook] = OrderedDict()
        self._resume: dict[Methods, Callable[[], None]] = {}
        self.plain: Methods = (Dense(),)
        try:
            self.use(self.plain)
        except UnsupportedModelError:
            self.plain = ()

    def use(self, methods: Methods) -> Plan | None:
        """Puts these methods on the model and takes others off. What they do to it; None for the model without a
        plug-in.

        Raises:
            LlmAccelError: they do not work on this model, which is without a plug-in then.
        """
        if methods != self._now:
            self.rest()
            if methods in self._resume:
                self._resume.pop(methods)()
            elif methods:
                configs, _ = chosen_methods(self._model, list(methods), False, self._decode)
                self._hooks[methods] = install(self._model, make_plan(self._model, configs, False, False, self._decode))
            self._now = methods
        if methods:
            self._hooks.move_to_end(methods)
            if len(self._hooks) > _READY:
                self._resume.pop(self._hooks.popitem(last=False)[0])
        return self.plan

    def rest(self) -> None:
        """The model is as it was before."""
        if self._now:
            self._resume[self._now] = suspend(self._model, self._hooks[self._now])
        self._now = ()

    @property
    def plan(self) -> Plan | None:
        """What is on the model now."""
        return self._hooks[self._now].plan if self._now else None

    @property
    def joins(self) -> bool:
        """Whether caches of what is on the model now can be joined, and prompts be read in chunks."""
        if self.plan is None:
            return stock_rows(self.new_cache())
        # what a method notes about images of one row is not known to the cache of another
        return self.plan.family is None and why_whole(self.plan, self._model.get_decoder().config) is None

    def new_cache(self) -> DynamicCache:
        """An empty cache for what is on the model now."""
        if self.plan is None:
            return DynamicCache(config=self._model.config)
        cache = DynamicCache()
        attach_session(cache, self.plan, self._model.get_decoder().config)
        return cache
