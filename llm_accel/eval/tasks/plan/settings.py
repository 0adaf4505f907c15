"""Settings of ``llm-accel plan``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from llm_accel.common.arguments import DTYPES, METHOD, canonical_methods
from llm_accel.common.options import Options, option
from llm_accel.errors import ConfigError
from llm_accel.eval.lengths import parse_length
from llm_accel.eval.summary import DENSE
from llm_accel.eval.tasks.bench.settings import parse_bytes
from llm_accel.methods import list_methods
from llm_accel.methods.kv.auto import Auto

GPUS = {  # memory bandwidth in bytes per second, from the data sheets of the vendors
    "a100-40gb": 1.555e12,
    "a100-80gb": 2.039e12,
    "b200": 8.0e12,
    "h100": 3.35e12,
    "h200": 4.8e12,
    "l4": 0.3e12,
    "l40s": 0.864e12,
    "mi300x": 5.3e12,
    "rtx-4090": 1.008e12,
}
DEFAULT_GPU = "h100"
QUESTIONS: dict[str, Literal["in_prompt", "later"]] = {"in-prompt": "in_prompt", "later": "later"}
_SHARE = "ratio=0.25"
_COMPARED = ("snapkv", "adakv", "kvzip", "streaming_llm")


def _bandwidth(text: str) -> int:
    return parse_bytes(text.removesuffix("/s"), "--bandwidth")


def _methods(specs: Sequence[str]) -> tuple[str, ...]:
    return (DENSE, *(method for method in canonical_methods(specs) if method != DENSE))


@dataclass(frozen=True, kw_only=True)
class PlanSettings(Options):
    """A model, what it is to read and answer, and the machine that it is planned for."""

    model: str | None = option(
        "HuggingFace id, folder, config.json, or a geometry of llm-accel bench (default: the bundled needle model)",
        None,
        metavar="ID|PATH|NAME",
    )
    context: int = option(
        "tokens of a prompt", 32768, metavar="N", shown="32k", parse=partial(parse_length, flag="--context")
    )
    batch: int = option("prompts that are decoded together", 1, least=1)
    new_tokens: int = option("tokens of an answer", 256, least=1)
    memory: int | None = option(
        "of the device, for weights and caches: 80GB (default: that of this machine's GPU, else no limit)",
        None,
        metavar="SIZE",
        parse=partial(parse_bytes, flag="--memory"),
    )
    question: str = option(
        "whether it is part of the prompt, or asked of the compressed cache", "in-prompt", choices=tuple(QUESTIONS)
    )
    methods: tuple[str, ...] = option(
        f"repeatable; dense is always there (default: auto and others with {_SHARE})",
        (),
        flag="--method",
        metavar=METHOD,
        parse=_methods,
        repeated=True,
    )
    gpu: str | None = option(
        f"whose memory bandwidth bounds a decode step (default: this machine's, else {DEFAULT_GPU})",
        None,
        choices=tuple(GPUS),
    )
    bandwidth: int | None = option("bytes per second, for example 2TB/s", None, metavar="SIZE", parse=_bandwidth)
    dtype: str = option("of weights and cache (default: the configuration's, else bfloat16)", "auto", choices=DTYPES)

    def validate(self) -> None:
        if self.gpu is not None and self.bandwidth is not None:
            raise ConfigError(f"--gpu {self.gpu} has a bandwidth; give either --gpu or --bandwidth.")
        if torch.cuda.is_available():
            self.resolve(memory=torch.cuda.get_device_properties(0).total_memory)
        if not self.methods:
            object.__setattr__(self, "methods", (DENSE, *self._compared()))

    def _compared(self) -> tuple[str, ...]:
        later = self.question == "later"
        found = {name: list_methods()[name] for name in _COMPARED if name in list_methods()}
        return (Auto.name, *(f"{name}:{_SHARE}" for name, cls in found.items() if not (later and cls.info.needs_query)))

    @property
    def rate(self) -> tuple[str, float]:
        """What bounds a decode step: its name, and bytes per second."""
        if self.bandwidth is not None:
            return "given bandwidth", float(self.bandwidth)
        if self.gpu is not None:
            return self.gpu, GPUS[self.gpu]
        here = torch.cuda.get_device_name(0).lower() if torch.cuda.is_available() else ""
        name = next((name for name in GPUS if all(part in here for part in name.split("-"))), DEFAULT_GPU)
        return (name if here else f"{name}, assumed"), GPUS[name]
