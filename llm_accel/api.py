"""The public calls: ``apply``, ``remove`` and the :class:`Handle` they work with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor
from transformers.cache_utils import DynamicCache

from llm_accel.methods import Grounding, MethodConfig, VideoTokens
from llm_accel.patches.auto import chosen_methods
from llm_accel.patches.compiled.call import refusal_of
from llm_accel.patches.hook import DecoderHook, attach_session
from llm_accel.patches.install import hook_of, install, make_plan, uninstall, unwrapped
from llm_accel.patches.persist import load_cache, save_cache
from llm_accel.patches.plan import Decode
from llm_accel.patches.prefill import Prompts, compress, prefill, why_whole
from llm_accel.patches.recording import Recording
from llm_accel.patches.replay import ReadCache
from llm_accel.patches.shared_prefill import record, resume, why_own
from llm_accel.registry import configure_all
from llm_accel.report import Report

Method = str | MethodConfig


class Handle:
    """What :func:`apply` returns. As a context manager it removes the plug-in on exit."""

    def __init__(self, model: Any, hook: DecoderHook, chosen: str | None = None) -> None:
        self._model = model
        self._hook = hook
        self._chosen = chosen

    @property
    def config(self) -> MethodConfig | tuple[MethodConfig, ...]:
        """The applied configuration, of ``auto`` what it chose; a tuple where several methods were composed."""
        configs = self._hook.plan.configs
        return configs[0] if len(configs) == 1 else configs

    def report(self) -> Report:
        """What the last call did: lengths, bytes, skipped layers, backends."""
        plan = self._hook.plan
        layers = self._hook.layer_reports()
        warnings = []
        if plan.hides:
            warnings.append("entries are hidden from attention, none is evicted: this frees no memory")
        elif layers and plan.evicts and not any(layer.evicted for layer in layers):
            warnings.append("nothing was evicted: the prompt fits into the budget")
        if layers and plan.attention_method is not None and not any(layer.sparse_calls for layer in layers):
            warnings.append(
                "every attention call was dense: the context is too short for this method to leave anything out"
            )
        backends = dict(plan.backends)
        refusal = refusal_of(self._model.get_decoder())
        if refusal is not None:
            backends["decode steps"] = ("eager", refusal)
        visual = self._hook.visual_report()
        if layers and plan.visual and visual.before == 0:
            warnings.append("no visual token was taken out: the prompt has none")
        if layers and isinstance(plan.tokens, VideoTokens) and visual.before and visual.before == visual.after:
            warnings.append(f"{plan.tokens.name} took no token out: only tokens of videos beyond the budget leave")
        if layers and plan.decoding is not None and not visual.before:
            warnings.append(f"{plan.decoding.name} left this call alone: its prompt has no image")
        for config in plan.configs:
            warnings.extend(config.cautions)
            if layers and isinstance(config, Grounding) and config.acts and not visual.before:
                warnings.append(f"{config.name} left this call alone: its prompt has no image")
        return Report(
            method=plan.title,
            backends=backends,
            layers=layers,
            visual_tokens_before=visual.before,
            visual_tokens_after=visual.after,
            exit_layer=visual.exit_layer,
            chosen=self._chosen,
            warnings=warnings,
        )

    def remove(self) -> None:
        """Takes the plug-in off the model, exactly; a no-op when it is gone already."""
        if hook_of(self._model) is self._hook:
            uninstall(self._model)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The model runs dense inside, in all threads."""
        before = self._hook.enabled
        self._hook.enabled = False
        try:
            yield
        finally:
            self._hook.enabled = before

    def new_cache(self) -> DynamicCache:
        """An empty cache for several turns: pass it as ``past_key_values`` to each of them (``cache`` in newer
        releases of transformers, which take both names)."""
        cache = DynamicCache()
        attach_session(cache, self._hook.plan, self._model.get_decoder().config)
        return cache

    def compress(
        self, context: Prompts, attention_mask: Tensor | None = None, *, protect_mask: Tensor | None = None
    ) -> DynamicCache:
        """Reads a context, compresses it before any question is known, and returns its cache. Each question goes to
        ``model.generate(torch.cat([context, question], 1), past_key_values=copy.deepcopy(cache))``, which reads the
        question alone; :meth:`save_cache` stores the cache for another day.

        Args:
            context: token ids [B, n], or a list of B 1-D tensors of any lengths, which are padded on the left.
            attention_mask: [B, n], zeros on the left of shorter rows; None: no padding.
            protect_mask: tokens whose entries must stay, bool [B, n]; they count in the budget.

        Raises:
            ConfigError: this is no context.
            UnsupportedCallError: the method evicts nothing, or only while decoding.
        """
        return compress(self._model, self._hook, context, attention_mask, protect_mask)

    def prefill(
        self,
        input_ids: Prompts,
        attention_mask: Tensor | None = None,
        *,
        rows: int | Sequence[int] = 1,
        protect_mask: Tensor | None = None,
    ) -> ReadCache:
        """Reads the prompts of a batch a few at a time, compresses each at once and joins what is left into one cache,
        from which ``model.generate(**cache.inputs, ...)`` continues as if it had read the whole batch in one call.
        So the batch is bound by what the compressed cache takes, not by what reading all prompts at once would take.

        Args:
            input_ids: token ids [B, n], or a list of B 1-D tensors of any lengths.
            attention_mask: [B, n], zeros on the left of shorter rows; None: no padding.
            rows: prompts read in one call, or how many in each of the calls: together, prompts of about equal length
                waste little on padding.
            protect_mask: prompt tokens whose entries must stay, bool [B, n]; they count in the budget.

        Raises:
            ConfigError: these are no prompts.
            UnsupportedCallError: caches of this method or model cannot be joined.
        """
        return prefill(self._model, self._hook, input_ids, attention_mask, rows, protect_mask)

    @property
    def can_prefill(self) -> bool:
        """Whether :meth:`prefill` works with this method on this model."""
        return why_whole(self._hook.plan, self._model.get_decoder().config) is None

    def record(self, input_ids: Prompts, attention_mask: Tensor | None = None) -> Recording:
        """Reads prompts once for several methods, to compare them: until the end of the prompt, methods that evict
        there are the dense model. Each of them, applied to the same model in turn, goes on by :meth:`resume`. The
        recording holds the whole cache and the queries of the prompts, whatever the method.

        Args:
            input_ids: token ids [B, n], or a list of B 1-D tensors of any lengths.
            attention_mask: [B, n], zeros on the left of shorter rows; None: no padding.

        Raises:
            ConfigError: these are no prompts.
            UnsupportedCallError: this method reads prompts in a way of its own.
        """
        return record(self._model, self._hook, input_ids, attention_mask)

    def resume(self, recording: Recording) -> ReadCache:
        """What this method leaves of recorded prompts, as a cache from which ``model.generate(**cache.inputs, ...)``
        continues as if it had read them. The recording stays as it is.

        Raises:
            UnsupportedCallError: this method reads prompts in a way of its own, or the recording is of another model.
        """
        return resume(self._model, self._hook, recording)

    @property
    def can_resume(self) -> bool:
        """Whether :meth:`record` and :meth:`resume` work with this method on this model."""
        return why_own(self._hook.plan, self._model.get_decoder().config) is None

    def save_cache(self, cache: DynamicCache, path: str | Path) -> None:
        """Writes a filled cache of this method to a safetensors file, with the method and the model it belongs to."""
        save_cache(cache, path, self._model, self._hook.plan)

    def load_cache(self, path: str | Path) -> DynamicCache:
        """Reads what :meth:`save_cache` wrote; :class:`ConfigError` if method or model differ."""
        return load_cache(path, self._model, self._hook.plan)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def apply(
    model: Any,
    method: Method | Sequence[Method],
    *,
    trace: bool = False,
    strict: bool = False,
    decode: Decode = "eager",
    mlp_chunk: int | None = None,
    **options: Any,
) -> Handle:
    """Accelerates one model instance; plain ``model.generate()`` from here on.

    Args:
        model: a decoder-only transformers model, text or vision-language, or what ``torch.compile`` made of it.
        method: a name (see :func:`llm_accel.list_methods`), also with options as on the command line
            (``"snapkv:budget=64"``), a configuration object, or a list of these to compose.
        trace: record the original positions of kept entries in ``Handle.report()``.
        strict: raise where a layer would be left as it is or a backend would be replaced by a slower one.
        decode: how tokens after the prompt are computed. "eager": layer by layer. "compiled": each step as one compiled
            graph over buffers of fixed size, the same for every prompt length; :class:`ConfigError` where methods or
            model do not allow it. "auto": compiled on a GPU where that is possible, else eager; the report says which.
        mlp_chunk: tokens, of all rows together, that an MLP computes at once. Exact; long prompts then need no memory
            for the intermediate activations of all their tokens. None: as the model does it.
        **options: options of the method when it is given by name.

    Raises:
        UnknownMethodError: no method has this name.
        ConfigError: an option is unknown or has an impossible value.
        UnsupportedModelError: the model cannot be accelerated with this method.
        AlreadyAppliedError: the model carries a plug-in already.
    """
    given = [method] if isinstance(method, str | MethodConfig) or not isinstance(method, Sequence) else list(method)
    configs = configure_all(given, options)
    model = unwrapped(model)
    configs, chosen = chosen_methods(model, configs, strict, decode)
    plan = make_plan(model, configs, trace, strict, decode, mlp_chunk)
    return Handle(model, install(model, plan), chosen)


def remove(model: Any) -> None:
    """Takes the plug-in off a model, exactly; a no-op on a model without one."""
    uninstall(unwrapped(model))
