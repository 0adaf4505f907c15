"""The samples of one calibration: observed once each, written at once, found again by a run that goes on."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llm_accel.calibrate.dyvte.observe import Observation, observe
from llm_accel.calibrate.dyvte.train import Trained, train_routers
from llm_accel.common.environment import versions
from llm_accel.common.progress import bar
from llm_accel.errors import ConfigError
from llm_accel.eval.records import Record, RunDir
from llm_accel.methods import CutModel
from llm_accel.patches.families import VisionFamily

Inputs = Mapping[str, Tensor]
Sample = Inputs | tuple[Inputs, Tensor | Sequence[int] | None]


FIELDS = ("sample",)  # what tells the records of a calibration apart


class Run:
    """The samples of one calibration, in memory and, where ``out`` is given, on disk."""

    def __init__(self, model: Any, family: VisionFamily, tokens: int, routers: bool, out: Path | None) -> None:
        self.model = model
        self.family = family
        self.tokens = tokens
        self.routers = routers
        self.out = out
        self.run_dir = None if out is None else RunDir(out, FIELDS)
        self.records: list[Record] = []
        self.features: list[Tensor] = []
        self._done: dict[int, Record] = {}

    def open(self, settings: dict[str, Any], overwrite: bool) -> None:
        """Finds what an earlier run has done."""
        if self.run_dir is None:
            return
        about = {"command": "calibrate dyvte", "versions": versions(), "argv": sys.argv[1:]}
        self._done = {record["sample"]: record for record in self.run_dir.open(settings, about, overwrite)}
        if self._done:
            print(f"{self.out}: {len(self._done)} samples are there already", file=sys.stderr)

    def observe(self, samples: Iterable[Sample], total: int | None) -> None:
        """Observes what is not there yet, and writes each sample at once.

        Raises:
            ConfigError: a sample cannot be used, or is another one than in the earlier run.
        """
        with bar(total, "sample") as counter:
            for index, sample in enumerate(samples):
                inputs, answer = sample if isinstance(sample, tuple) else (sample, None)
                try:
                    self._one(index, inputs, answer)
                except ConfigError as error:
                    raise ConfigError(f"sample {index}: {error}") from error
                counter.update(1)
        if not self.records:
            raise ConfigError("there is no sample; give at least one.")

    def _one(self, index: int, inputs: Inputs, answer: Tensor | Sequence[int] | None) -> None:
        digest, record = _digest(inputs, answer), self._done.get(index)
        if record is not None and record["prompt"] != digest:
            raise ConfigError(
                f"{str(self.out)!r} holds another one in this place; give the samples of that run, another folder, or "
                "overwrite it."
            )
        file = None if self.out is None else self.out / "features" / f"{index:06d}.safetensors"
        if record is not None and not self.routers:
            self.records.append(record)
            return
        if record is not None and file is not None and file.is_file():
            self.records.append(record)
            self.features.append(load_file(file)["features"])
            return
        inputs = {key: value.to(self.model.device) for key, value in inputs.items() if torch.is_tensor(value)}
        ids = _greedy(self.model, inputs, self.tokens) if answer is None else torch.as_tensor(answer).flatten()
        if not len(ids):
            raise ConfigError("its answer has no token.")
        seen = observe(self.model, inputs, ids.to(self.model.device), self.family)
        features = seen.features.bfloat16()
        if self.routers and file is not None:
            file.parent.mkdir(exist_ok=True)
            partial = file.with_name(file.name + ".partial")
            save_file({"features": features}, partial)
            partial.replace(file)
        new = _record(index, inputs, ids, digest, seen, answer is not None)
        if self.run_dir is not None and record is None:
            self.run_dir.append([new])
        self.records.append(new if record is None else record)
        if self.routers:
            self.features.append(features)

    def train(self, about: CutModel, labels: Sequence[Sequence[bool]], dim: int, seed: int) -> Trained:
        """Routers of all layers; ``labels``: of each sample and layer."""
        layers = range(about.first, about.layers - 1)
        with bar(len(layers), "router") as counter:
            return train_routers(
                torch.stack(self.features),
                torch.tensor(labels),
                layers,
                dim,
                seed,
                self.model.device,
                tick=counter.update,
            )


@torch.no_grad()
def _greedy(model: Any, inputs: Inputs, tokens: int) -> Tensor:
    """The model's own answer, with the token that ends it."""
    written = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, num_beams=1)
    answer: Tensor = written[0, inputs["input_ids"].shape[1] :]
    return answer


def _digest(inputs: Inputs, answer: Tensor | Sequence[int] | None) -> str:
    """SHA-256 of a sample, 16 hex digits."""
    digest = hashlib.sha256()
    for name in sorted(inputs):
        if torch.is_tensor(inputs[name]):
            values = inputs[name].detach().cpu().contiguous()
            digest.update(
                f"{name} {tuple(values.shape)} ".encode() + values.flatten().view(torch.uint8).numpy().tobytes()
            )
    if answer is not None:
        digest.update(repr(torch.as_tensor(answer).flatten().tolist()).encode())
    return digest.hexdigest()[:16]


def _record(index: int, inputs: Inputs, ids: Tensor, digest: str, seen: Observation, given: bool) -> Record:
    return {
        "sample": index,
        "length": int(inputs["input_ids"].shape[1]),
        "prompt": digest,
        "answer": ids.tolist(),
        "given": given,
        "loss": seen.loss,
        "losses": list(seen.losses),
        "agreement": list(seen.agreement),
    }
