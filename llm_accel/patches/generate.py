"""``model.generate`` on a patched instance: refuses what cannot work, announces the prompt, then plain generate."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from llm_accel.errors import UnsupportedCallError
from llm_accel.patches.hook import DecoderHook, adopt

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

_ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
SHADOWED = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")


class GenerateProxy:
    """Instance attribute ``generate``. An object rather than a closure: deepcopy and pickle carry it to the copy."""

    def __init__(self, model: PreTrainedModel, hook: DecoderHook) -> None:
        self.model = model
        self.hook = hook

    def __call__(self, *args: Any, protect_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """Same as ``generate`` of transformers.

        Args:
            protect_mask: prompt tokens whose entries must stay, bool [B, prompt length]; they count in the budget.
        """
        generate = type(self.model).generate
        if not self.hook.enabled:
            return generate(self.model, *args, **kwargs)
        config = kwargs.get("generation_config") or self.model.generation_config
        self._refuse(kwargs, config)
        if not self._setting("use_cache", kwargs, config, default=True):
            return generate(self.model, *args, **kwargs)
        cache = kwargs.get("past_key_values")
        if cache is None:
            cache = DynamicCache()
        session = adopt(cache, self.hook.plan, self.model.get_decoder().config)
        prompt = _prompt_length(args, kwargs)
        if prompt is not None:
            session.announce(prompt, protect_mask)
        output = generate(self.model, *args, **(kwargs | {"past_key_values": cache}))
        self.hook.settle(session)
        return output

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.model).generate)

    @staticmethod
    def _setting(name: str, kwargs: dict[str, Any], config: GenerationConfig, default: Any = None) -> Any:
        value = kwargs.get(name)
        value = getattr(config, name, None) if value is None else value
        return default if value is None else value

    def _refuse(self, kwargs: dict[str, Any], config: GenerationConfig) -> None:
        if self.hook.plan.keeper is not None:
            for name in _ASSISTED:
                if self._setting(name, kwargs, config):
                    raise UnsupportedCallError(
                        f"assisted decoding ({name}) rolls the cache back, which eviction does not allow; "
                        "leave it out, or call inside handle.disabled()."
                    )
        kind = self._setting("cache_implementation", kwargs, config)
        if kind not in (None, "dynamic"):
            raise UnsupportedCallError(
                f"cache_implementation={kind!r} brings a cache of its own; leave it out or give 'dynamic'."
            )
        if self._setting("output_attentions", kwargs, config):
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


def _prompt_length(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Logical length at the end of the prompt: earlier turns on a given cache included."""
    candidates = (kwargs.get("inputs_embeds"), args[0] if args else kwargs.get("inputs"), kwargs.get("input_ids"))
    prompt = next((tensor for tensor in candidates if torch.is_tensor(tensor)), None)
    if prompt is None:
        return None
    mask = kwargs.get("attention_mask")
    length = int(prompt.shape[1])
    return max(length, int(mask.shape[1])) if torch.is_tensor(mask) and mask.ndim == 2 else length
