"""``model.generate`` on a patched instance: refuses what cannot work, announces the prompt, then plain generate."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.cache_utils import DynamicCache

from llm_accel.cache.fixed import round_up
from llm_accel.errors import UnsupportedCallError
from llm_accel.patches.cache_name import CACHE, named, named_cache
from llm_accel.patches.contrast import ContrastProcessor
from llm_accel.patches.hook import DecoderHook, attach_session
from llm_accel.patches.replay import is_waiting

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
SHADOWED = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")


class GenerateProxy:
    """Instance attribute ``generate``. An object rather than a closure: deepcopy and pickle carry it to the copy."""

    def __init__(self, model: PreTrainedModel, hook: DecoderHook) -> None:
        self.model: Any = model
        self.hook = hook

    def __call__(self, *args: Any, protect_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """Same as ``generate`` of transformers.

        Args:
            protect_mask: prompt tokens whose entries must stay, bool [B, prompt length]; they count in the budget.
        """
        generate = type(self.model).generate
        kwargs = named_cache(named(generate, args, kwargs))
        if not self.hook.enabled:
            return generate(self.model, **kwargs)
        self._refuse(kwargs)
        if self._setting("use_cache", kwargs) is False:
            return generate(self.model, **kwargs)
        cache = kwargs.get(CACHE)
        if cache is None:
            cache = DynamicCache()
        session = attach_session(cache, self.hook.plan, self.model.get_decoder().config)
        if is_waiting(cache) and protect_mask is not None:
            raise UnsupportedCallError("this cache holds its prompt already; give protect_mask to handle.prefill.")
        prompt = _prompt_length(kwargs)
        if prompt is not None:
            session.announce(prompt, protect_mask)
            session.headroom = self._new_tokens(prompt, kwargs)
        beams = self._setting("num_beams", kwargs) or 1
        session.eager_because = "beam search reorders the cache at each step" if beams > 1 else None
        kwargs[CACHE] = cache
        if self._setting("cache_implementation", kwargs):
            kwargs["cache_implementation"] = None  # transformers takes either a cache or a kind of cache
        decoding = self.hook.plan.decoding
        if decoding is not None and decoding.contrasts:
            contrast = ContrastProcessor(session, decoding, self.model.get_output_embeddings())
            kwargs["logits_processor"] = LogitsProcessorList([contrast, *(kwargs.get("logits_processor") or ())])
        output = generate(self.model, **kwargs)
        session.end_graph()
        self.hook.settle(session)
        return output

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.model).generate)

    def _setting(self, name: str, kwargs: dict[str, Any]) -> Any:
        """A setting as generate resolves it: the argument, else the given configuration, else the model's own."""
        if name in kwargs:
            return kwargs[name]
        value = getattr(kwargs.get("generation_config"), name, None)
        return getattr(self.model.generation_config, name, None) if value is None else value

    def _new_tokens(self, prompt: int, kwargs: dict[str, Any]) -> int | None:
        """Tokens that will be decoded at most, rounded up, so that calls of about equal length share buffers."""
        new, length = self._setting("max_new_tokens", kwargs), self._setting("max_length", kwargs)
        if new is None and length is None:
            return None
        return round_up(max(1, length - prompt if new is None else new))

    def _refuse(self, kwargs: dict[str, Any]) -> None:
        plan = self.hook.plan
        in_steps = plan.decoding is not None or plan.grounds
        if in_steps and self._setting("use_cache", kwargs) is False:
            raise UnsupportedCallError(
                f"{plan.title} acts on decode steps, of which there are none with use_cache=False; leave it out."
            )
        if plan.evicts or in_steps:
            for name in _ASSISTED:
                if self._setting(name, kwargs):
                    raise UnsupportedCallError(
                        f"assisted decoding ({name}) rolls the cache back, which {plan.title} does not allow; "
                        "leave it out, or call inside handle.disabled()."
                    )
        kind = self._setting("cache_implementation", kwargs)
        if kind not in (None, "dynamic", "hybrid"):  # "hybrid" is a leftover in checkpoints, which generate ignores
            raise UnsupportedCallError(
                f"cache_implementation={kind!r} brings a cache of its own; leave it out or give 'dynamic'."
            )
        if self._setting("output_attentions", kwargs):
            raise UnsupportedCallError(
                "output_attentions=True needs the attention matrix of every layer, which is never built here; "
                "call inside handle.disabled()."
            )


class RefusingProxy:
    """Stands in for entry points whose paged cache would silently bypass the plug-in."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises :class:`UnsupportedCallError`."""
        raise UnsupportedCallError(
            f"{self.name} runs continuous batching on a paged cache, where nothing would be compressed; use "
            "model.generate with a left-padded batch, or call llm_accel.remove(model) first."
        )


def _prompt_length(kwargs: dict[str, Any]) -> int | None:
    """Logical length at the end of the prompt: earlier turns on a given cache included."""
    candidates = (kwargs.get(name) for name in ("inputs_embeds", "inputs", "input_ids"))
    prompt = next((tensor for tensor in candidates if torch.is_tensor(tensor)), None)
    if prompt is None:
        return None
    mask = kwargs.get("attention_mask")
    length = int(prompt.shape[1])
    return max(length, int(mask.shape[1])) if torch.is_tensor(mask) and mask.ndim == 2 else length
