"""Calibrates one model on samples, resumably: after which layer visual tokens may leave, and routers that decide it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from llm_accel.calibrate.dyvte.observe import safe_exits
from llm_accel.calibrate.dyvte.runs import CalibrationRun, Sample
from llm_accel.calibrate.dyvte.train import Trained
from llm_accel.common.environment import packages
from llm_accel.errors import ConfigError
from llm_accel.eval.records import Record
from llm_accel.methods import CutModel, DyVTE, ExitProfile, Routers
from llm_accel.methods.visual.exit_profile import LayerExit, at_most, calibrated_exit
from llm_accel.methods.visual.routers import RouterInfo
from llm_accel.patches.families import VisionFamily
from llm_accel.patches.install import make_plan, unwrapped
from llm_accel.patches.vision.cut_plan import cut_model

EPSILON = 0.02
CONFIDENCE = 0.95
ROUTER_DIM = 2048
MAX_NEW_TOKENS = 32
_DIGITS = 6


@dataclass(frozen=True)
class Calibration:
    """What was found."""

    profile: ExitProfile  # the measurements and the calibrated layer
    routers: Routers | None = None  # the trained routers, or None where none were wanted
    routed: tuple[float, float] | None = None  # see :class:`llm_accel.calibrate.dyvte.train.Trained`

    def save(self, folder: str | Path) -> None:
        """Writes ``dyvte.json`` and, where there are routers, ``routers.safetensors``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.profile.save(folder / "dyvte.json")
        if self.routers is not None:
            self.routers.save(folder / "routers.safetensors")


def calibrate_dyvte(
    model: Any,
    samples: Iterable[Sample],
    *,
    num_samples: int | None = None,
    epsilon: float = EPSILON,
    confidence: float = CONFIDENCE,
    slack: float = 0.0,
    routers: bool = True,
    router_dim: int = ROUTER_DIM,
    max_new_tokens: int = MAX_NEW_TOKENS,
    seed: int = 0,
    out: str | Path | None = None,
    overwrite: bool = False,
    name: str = "",
) -> Calibration:
    """Measures on every sample and for every layer whether the answer stays what it was when visual tokens leave there.

    A layer is safe for a sample if more than 99 % of the answer's tokens stay the most likely ones and their loss stays
    below 1.03 times that of the full model (the labels of the paper). The calibrated layer is the first one from which
    on every layer changes at most ``epsilon`` of all such prompts, with this ``confidence``: few samples prove little,
    so with the defaults it takes 149 of which none changes. Routers learn the same labels per layer.

    Args:
        model: a vision-language model without a plug-in.
        samples: what the processor made of one image and prompt, one row without padding; or a tuple of that and the
            ids of the answer. By default the answer is the model's own, decoded greedily: a label is agreement with the
            full model.
        num_samples: read no more than so many; None: all.
        epsilon: share of all prompts like the samples that may change their answer.
        confidence: with which the upper bound on that share holds, which decides.
        slack: nats per token by which the loss may always grow. 0 as in the paper; a model whose own answers have next
            to no loss needs some, or 3 % of nothing decides.
        routers: whether to train routers.
        router_dim: their width r; 2048 in the paper, which makes 2 C r + 2 r weights per layer.
        max_new_tokens: of the model's own answers.
        seed: of the routers.
        out: folder for records, features and results; an interrupted run is resumed there. None: nothing is written.
        overwrite: start over in ``out``.
        name: what files call the model; its path by default.

    Raises:
        ConfigError: an option, a sample or ``out`` cannot be used.
        UnsupportedModelError: visual tokens cannot leave between the layers of this model.
        AlreadyAppliedError: the model carries a plug-in.
    """
    counts = {"num_samples": num_samples, "router_dim": router_dim, "max_new_tokens": max_new_tokens}
    for option, value, least in [*((name, value, 1) for name, value in counts.items()), ("slack", slack, 0)]:
        if value is not None and not least <= value < math.inf:
            raise ConfigError(f"{option}={value} is not allowed; give a finite number of at least {least}.")
    if not 0.0 <= epsilon < 1.0:
        raise ConfigError(f"epsilon={epsilon} is not allowed; give a number in [0, 1).")
    if not 0.0 < confidence < 1.0:
        raise ConfigError(f"confidence={confidence} is not allowed; give a number in (0, 1), such as 0.95.")
    model = unwrapped(model)
    family = _family(model)
    about = cut_model(model, family)
    settings = {"max_new_tokens": max_new_tokens, "weights_hash": about.weights_hash}
    run = CalibrationRun(model, family, max_new_tokens, routers, None if out is None else Path(out))
    run.open(settings, overwrite)
    total = num_samples if num_samples is not None or not isinstance(samples, Sized) else len(samples)
    run.observe(islice(samples, num_samples), total)
    labels = [safe_exits(one["loss"], one["losses"], one["agreement"], slack) for one in run.records]
    trained = run.train(about, labels, router_dim, seed) if routers else None
    name = name or getattr(model.config, "_name_or_path", "") or about.name
    told = {"max_new_tokens": max_new_tokens, "slack": slack}
    result = _result(run.records, labels, about, trained, name, (epsilon, confidence), seed, told)
    if out is not None:
        result.save(out)
    return result


def _rounded(values: Iterable[float]) -> list[float]:
    return [round(value, _DIGITS) for value in values]


def _family(model: Any) -> VisionFamily:
    """The family of a model on which the method would work; raises what applying it would."""
    last = int(model.get_decoder().config.num_hidden_layers) - 1 if hasattr(model, "get_decoder") else 0
    family = make_plan(model, [DyVTE(exit=last)], trace=False, strict=False).family
    assert family is not None
    return family


def _result(
    records: Sequence[Record],
    labels: Sequence[Sequence[bool]],
    about: CutModel,
    trained: Trained | None,
    name: str,
    limit: tuple[float, float],
    seed: int,
    settings: dict[str, Any],
) -> Calibration:
    def mean(rows: Iterable[Sequence[float]]) -> list[float]:
        return [round(value, _DIGITS) for value in torch.tensor(list(rows), dtype=torch.float64).mean(0).tolist()]

    rates, (epsilon, confidence) = mean(labels), limit
    changed = [at_most(sum(not safe for safe in layer), len(labels), confidence) for layer in zip(*labels, strict=True)]
    agreement, losses = mean(r["agreement"] for r in records), mean(r["losses"] for r in records)
    given = sum(record["given"] for record in records)
    profile = ExitProfile(
        model=name,
        layers=about.layers,
        exit=calibrated_exit(changed, about.first, epsilon),
        epsilon=epsilon,
        confidence=confidence,
        samples=len(records),
        loss=mean([[record["loss"]] for record in records])[0],
        per_layer=tuple(
            map(LayerExit, range(about.first, about.layers - 1), rates, agreement, losses, _rounded(changed))
        ),
        routers=() if trained is None else trained.scores,
        config_hash=about.config_hash,
        weights_hash=about.weights_hash,
        seed=seed,
        settings=settings | {"answers_given": given, "answers_own": len(records) - given},
        versions=packages(),
    )
    if trained is None:
        return Calibration(profile)
    info = RouterInfo(name, about.layers, about.hidden, about.config_hash, about.weights_hash, len(records), seed)
    return Calibration(profile, Routers(info, trained.weights), trained.routed)
