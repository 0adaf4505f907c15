"""The model type ``llm_accel`` of lm-evaluation-harness: its HuggingFace model with a method applied to it."""

from __future__ import annotations

import logging
from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from llm_accel import __version__
from llm_accel.api import apply
from llm_accel.common.bundled import needle_model_path
from llm_accel.common.checkpoints import resolve_model
from llm_accel.registry import parse_all, spec_of

logger = logging.getLogger(__name__)


@register_model("llm_accel")
class LlmAccelLM(HFLM):  # type: ignore[misc]  # the harness has no types
    """``HFLM`` with a method on its model.

    Args:
        pretrained: as for ``HFLM``, or the short name of a fetched checkpoint; left out, the bundled needle model in
            float32.
        method: a method as on the command line, ``dense`` for none.
        strict, decode: see :func:`llm_accel.apply`.
        **options: of ``HFLM``.

    Raises:
        LlmAccelError: no such method, or not for this model.
    """

    def __init__(
        self,
        pretrained: Any = None,
        method: str = "dense",
        strict: bool = False,
        decode: Any = "eager",
        **options: Any,
    ) -> None:
        configs = parse_all(method)  # before weights are loaded
        if pretrained is None:
            pretrained = str(needle_model_path())
            options.setdefault("dtype", "float32")
        elif isinstance(pretrained, str):
            pretrained = resolve_model(pretrained)
        super().__init__(pretrained, **options)
        self.method = spec_of(configs)
        self.handle = apply(self.model, list(configs), strict=strict, decode=decode) if configs else None
        self._only_evicts = any(config.info.frees_memory for config in configs)
        self._calls = self._kv_bytes = self._dense_kv_bytes = self._one_pass = 0

    def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
        """Counts what the cache of every call holds."""
        tokens = super()._model_generate(*args, **kwargs)
        self._calls += 1
        if self.handle is not None:
            report = self.handle.report()
            self._kv_bytes += report.kv_bytes
            self._dense_kv_bytes += report.dense_kv_bytes
        return tokens

    def loglikelihood(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        """As the harness does it; warns where the method does not act on it."""
        self._warn(len(requests))
        return super().loglikelihood(requests, *args, **kwargs)

    def loglikelihood_rolling(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        """As the harness does it; warns where the method does not act on it."""
        self._warn(len(requests))
        return super().loglikelihood_rolling(requests, *args, **kwargs)

    def _warn(self, count: int) -> None:
        if self._only_evicts and not self._one_pass:
            logger.warning(
                "%s evicts after the prompt, and a loglikelihood request is one forward pass with nothing after it: "
                "these scores are those of the dense model. Take tasks that generate.",
                self.method,
            )
        self._one_pass += count

    def get_model_info(self) -> dict[str, Any]:
        """The model's entry in the results, with the method and the size of its caches."""
        share = self._kv_bytes / self._dense_kv_bytes if self._dense_kv_bytes else None
        return {
            **super().get_model_info(),
            "llm_accel_version": __version__,
            "llm_accel_method": self.method,
            "llm_accel_generate_calls": self._calls,
            "llm_accel_loglikelihood_requests": self._one_pass,
            "llm_accel_kv_of_dense": share,
        }
