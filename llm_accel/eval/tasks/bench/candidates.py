"""One model per candidate, all sharing one set of weights, so that each keeps what it has compiled."""

from __future__ import annotations

import copy
import gc
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig, StoppingCriteriaList

from llm_accel.api import Handle, apply
from llm_accel.common.generation import Clock, held_bytes
from llm_accel.errors import ConfigError
from llm_accel.eval.tasks.bench.memory import PeakMemory
from llm_accel.eval.tasks.bench.settings import Candidate
from llm_accel.methods import Dense
from llm_accel.registry import parse_all

WARM = 2  # decode steps after the prompt that no figure counts


@dataclass
class TimedCall:
    """One ``generate`` call."""

    first_ms: float  # time to first token
    steps_ms: list[float]  # every decode step after the first :data:`WARM`
    kv_bytes: int  # bytes that the cache holds at the end
    dense_kv_bytes: int  # bytes that a dense cache of the same length would hold
    notes: dict[str, tuple[str, str]] = field(default_factory=dict)  # how the plug-in decoded, and why


def share_weights(model: Any) -> Any:
    """A copy of a model that shares its parameters and buffers."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo=shared)


class CandidateRunner:
    """A candidate on a model of its own."""

    def __init__(self, model: Any, candidate: Candidate) -> None:
        self.candidate, self.model = candidate, share_weights(model)
        configs = parse_all(candidate.method)
        if not configs and candidate.decode == "compiled":
            configs = (Dense(),)
        self.handle: Handle | None = None
        if configs and candidate.decode != "static":
            self.handle = apply(self.model, configs, decode=candidate.decode)
        self._options = self._generate_options()

    def _generate_options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
        if self.candidate.decode == "static":
            options["cache_implementation"] = "static"
            on_gpu = self.model.device.type == "cuda"
            options["compile_config"] = CompileConfig(fullgraph=True, mode="reduce-overhead" if on_gpu else "default")
            options["compile_config"]._compile_all_devices = True
        return options

    def run(
        self,
        inputs: dict[str, Tensor],
        new_tokens: int,
        stop_after: int | None = None,
        memory: PeakMemory | None = None,
    ) -> TimedCall:
        """Generates ``new_tokens`` after a prompt, or fewer with ``stop_after``, on storage for all of them."""
        clock = Clock(self.model.device, stop_after, None if memory is None else memory.lap)
        begin = clock.now()
        output = self.model.generate(
            **inputs,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            stopping_criteria=StoppingCriteriaList([clock]),
            **self._options,
        )
        steps = [1e3 * (end - start) for start, end in zip(clock.ticks[:-1], clock.ticks[1:], strict=True)]
        first = 1e3 * (clock.ticks[0] - begin)
        notes = {} if self.handle is None else dict(self.handle.report().backends)
        return TimedCall(first, steps[WARM:], *held_bytes(output, self.handle), notes)

    def warm_up(self, inputs: dict[str, Tensor], new_tokens: int, weight_bytes: int) -> PeakMemory | None:
        """A short call outside of all timings, and its peaks; compiled code is compiled in a call before."""
        if self.candidate.decode != "eager":
            self.run(inputs, new_tokens, stop_after=4)
        return self.measure_memory(inputs, new_tokens, weight_bytes)

    def measure_memory(self, inputs: dict[str, Tensor], new_tokens: int, weight_bytes: int) -> PeakMemory | None:
        """Peaks of a short call, or None where they cannot be measured: compiled code on a CPU."""
        if self.model.device.type != "cuda" and self.candidate.decode in ("compiled", "static"):
            return None
        gc.collect()  # what earlier calls left in cycles is no part of this one
        with PeakMemory(self.model.device, weight_bytes) as memory:
            self.run(inputs, new_tokens, stop_after=4, memory=memory)
        return memory


def make_inputs(model: Any, length: int, batch: int, seed: int) -> dict[str, Tensor]:
    """Random token ids [batch, length] with a full mask; for a vision-language model one image per row among them.
    Raises :class:`ConfigError`: the prompt is too short for the image."""
    text, device = model.config.get_text_config(), model.device
    generator = torch.Generator().manual_seed(seed + 1)
    ids = torch.randint(3, min(text.vocab_size, 30000), (batch, length), generator=generator).to(device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    image = getattr(model.config, "image_token_id", None) or getattr(model.config, "image_token_index", None)
    vision = getattr(model.config, "vision_config", None)
    if image is None or vision is None:
        return inputs
    tokens = (vision.image_size // vision.patch_size) ** 2
    if length < tokens + 64:
        raise ConfigError(f"--lengths {length}: an image takes {tokens} tokens; give at least {tokens + 64}.")
    ids[:, 32 : 32 + tokens] = image
    pixels = torch.randn(batch, 3, vision.image_size, vision.image_size, generator=generator)
    return inputs | {"pixel_values": pixels.to(device, model.dtype)}
