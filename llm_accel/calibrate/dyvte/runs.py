"""The samples of one calibration: each is observed once and written at once, and a resumed run reads it back."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llm_accel.calibrate.dyvte.observe import Observation, observe
from llm_accel.calibrate.dyvte.train import Trained, train_routers
from llm_accel.common.environment import versions
from llm_accel.common.progress import iterate
from llm_accel.errors import ConfigError
from llm_accel.eval.records import Record, RunDir
from llm_accel.methods import CutModel
from llm_accel.patches.families import VisionFamily

Inputs = Mapping[str, Tensor]
Sample = Inputs | tuple[Inputs, Tensor | Sequence[int] | None]


FIELDS = ("sample",)  # identify a record of a calibration


@dataclass
class CalibrationRun:
    """The samples of one calibration, in memory and, where ``out`` is given, on disk. ``tokens``: length of the model's
    own answers; ``routers``: whether features for routers are recorded."""

    model: Any
    family: VisionFamily
    tokens: int
    routers: bool
    out: Path | None
    records: list[Record] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)
    _done: dict[int, Record] = field(default_factory=dict)

    def open(self, settings: dict[str, Any], overwrite: bool) -> None:
        """Reads the records of an earlier run."""
        if self.out is None:
            return
        about = {"command": "calibrate dyvte", "versions": versions(), "argv": sys.argv[1:]}
        done = RunDir(self.out, FIELDS).open(settings, about, overwrite)
        self._done = {record["sample"]: record for record in done}
        if self._done:
            print(f"{self.out}: {len(self._done)} samples are already done", file=sys.stderr)

    def observe(self, samples: Iterable[Sample], total: int | None) -> None:
        """Observes samples without a record, and writes each at once.

        Raises:
            ConfigError: a sample cannot be used, or is another one than in the earlier run.
        """
        for index, sample in enumerate(iterate(samples, "sample", total)):
            inputs, answer = sample if isinstance(sample, tuple) else (sample, None)
            try:
                self._one(index, inputs, answer)
            except ConfigError as error:
                raise ConfigError(f"sample {index}: {error}") from error
        if not self.records:
            raise ConfigError("there is no sample; give at least one.")

    def _one(self, index: int, inputs: Inputs, answer: Tensor | Sequence[int] | None) -> None:
        digest, record = _digest(inputs, answer), self._done.get(index)
        if record is not None and record["prompt"] != digest:
            raise ConfigError(
                f"{str(self.out)!r} holds another sample at this index; give the samples of that run or another "
                "folder, or overwrite it."
            )
        file = None if self.out is None else self.out / "features" / f"{index:06d}.safetensors"
        if record is not None and file is not None and (not self.routers or file.is_file()):
            self.records.append(record)
            self.features += [load_file(file)["features"]] if self.routers else []
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
        if self.out is not None and record is None:
            RunDir(self.out, FIELDS).append([new])
        self.records.append(new if record is None else record)
        if self.routers:
            self.features.append(features)

    def train(self, about: CutModel, labels: Sequence[Sequence[bool]], dim: int, seed: int) -> Trained:
        """Routers of all layers; ``labels``: of each sample and layer."""
        features, layers = torch.stack(self.features), range(about.first, about.layers - 1)
        return train_routers(features, torch.tensor(labels), layers, dim, seed, self.model.device)


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
