"""Models of lmms-eval with a method applied: the entry point ``lmms_eval.models`` finds ``llm_accel_<its own name>``.

``lmms-eval --model llm_accel_llava_hf --model_args "pretrained=ID,method=flowcut:budget=64" --tasks pope``

The harness cuts ``--model_args`` at commas, so here ``;`` joins options of a method: ``snapkv:budget=64;window=16``.

Its wrappers catch what goes wrong in ``generate`` and answer with an empty text, which looks like a bad score. Here the
first such error ends the run; ``strict=False`` continues, and reports at the end how many answers are missing.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from llm_accel.api import apply
from llm_accel.registry import parse_all, spec_of

logger = logging.getLogger(__name__)

WRAPPERS = {
    "InternVLHf": ("internvl_hf", "lmms_eval.models.chat.internvl_hf", "InternVLHf"),
    "LlavaHf": ("llava_hf", "lmms_eval.models.chat.llava_hf", "LlavaHf"),
    "Qwen25VL": ("qwen2_5_vl", "lmms_eval.models.chat.qwen2_5_vl", "Qwen2_5_VL"),
    "Qwen3VL": ("qwen3_vl", "lmms_eval.models.chat.qwen3_vl", "Qwen3_VL"),
}
"""Our classes: the harness's name of the model, its module, its class."""


class _Stop(BaseException):
    """Carries an error through the harness, which catches every ``Exception``."""


class Accelerated:
    """Mixin for wrappers of lmms-eval: applies a method to their model, and reports errors that they swallow.

    Args:
        method: a method as on the command line, with ``;`` between its options; ``dense`` for none.
        strict: whether an error in ``generate`` ends the run.
        **options: of the wrapper.

    Raises:
        LlmAccelError: no such method, or not for this model.
    """

    model: Any

    def __init__(self, *args: Any, method: str = "dense", strict: bool | str = True, **options: Any) -> None:
        configs = parse_all(method.replace(";", ","))  # before weights are loaded
        super().__init__(*args, **options)
        self.method, self.strict, self.failures = spec_of(configs), str(strict).lower() != "false", 0
        self.handle = apply(self.model, list(configs)) if configs else None

    def generate_until(self, requests: Any) -> Any:
        """As the wrapper does it; see ``strict``."""
        before = self.failures
        with _reporting_errors(self.model, self._failed):
            try:
                answers = super().generate_until(requests)  # type: ignore[misc]  # the wrapper's
            except _Stop as stop:
                raise stop.args[0] from None
        if self.failures > before:
            logger.error(
                "%d of %d answers are missing: generate failed, and these score as wrong answers.",
                self.failures - before,
                len(requests),
            )
        return answers

    def _failed(self, error: Exception) -> None:
        self.failures += 1
        if self.strict:
            raise _Stop(error)


@contextmanager
def _reporting_errors(model: Any, failed: Callable[[Exception], None]) -> Iterator[None]:
    """``failed`` sees each error of ``model.generate`` before the caller does; the model is as before afterwards."""
    own = "generate" in vars(model)
    generate = model.generate

    @functools.wraps(generate)
    def reporting(*args: Any, **kwargs: Any) -> Any:
        try:
            return generate(*args, **kwargs)
        except Exception as error:
            failed(error)
            raise

    model.generate = reporting
    try:
        yield
    finally:
        if own:
            model.generate = generate
        else:
            del model.generate


def manifests() -> list[Any]:
    """What the entry point hands to lmms-eval: a name and a class for each of its wrappers that we know."""
    registry: Any = importlib.import_module("lmms_eval.models.registry_v2")
    return [
        registry.ModelManifest(model_id=f"llm_accel_{name}", chat_class_path=f"{__name__}.{own}")
        for own, (name, _, _) in WRAPPERS.items()
    ]


def __getattr__(name: str) -> Any:
    """The class of a wrapper, made when it is asked for: each wrapper needs packages of its own."""
    if name not in WRAPPERS:
        raise AttributeError(name)
    _, module, base = WRAPPERS[name]
    made = type(name, (Accelerated, getattr(importlib.import_module(module), base)), {"__module__": __name__})
    globals()[name] = made
    return made
