"""After which layer the visual tokens of a model may leave: what was measured on samples, in a JSON file."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from llm_accel.errors import ConfigError
from llm_accel.methods.visual.base import CutModel

MAKE = "llm-accel calibrate dyvte --model NAME --data pairs.jsonl --out DIR"


class LayerExit(NamedTuple):
    """What happened when visual tokens left after one layer.

    Attributes:
        layer: index of the layer.
        safe_rate: share of the samples that kept their answer, in [0, 1].
        agreement: mean share of answer tokens that stayed the most likely ones.
        loss: mean loss of the answers, nats per token.
        changed_at_most: upper bound on the share of all prompts that change; None in files from before it decided.
    """

    layer: int
    safe_rate: float
    agreement: float
    loss: float
    changed_at_most: float | None = None


class RouterScore(NamedTuple):
    """How well the router of one layer tells safe exits from others, on samples that it was not trained on.

    Attributes:
        layer: index of the layer.
        base_rate: share of those samples that were safe.
        exits: share of them for which it said exit.
        precision: share of its exits that were safe; None where it never said exit.
        recall: share of the safe ones for which it said exit; None where none was safe.
    """

    layer: int
    base_rate: float
    exits: float
    precision: float | None
    recall: float | None


@dataclass(frozen=True)
class ExitProfile:
    """Measurements on one model.

    Attributes:
        model: name of the model.
        layers: layers L of its decoder.
        exit: the calibrated layer; the last one where no earlier one is safe.
        epsilon: share of the samples that may change their answer.
        samples: number of samples.
        confidence: with which no more than ``epsilon`` of all such prompts change; None in files from before it
            decided, whose layer rests on the share of the samples alone.
        loss: mean loss of the answers in the full model, nats per token.
        per_layer: from the first layer after which tokens may leave to the last but one.
        routers: the same layers, where routers were trained.
        config_hash, weights_hash: fingerprints of the model.
        seed: seed of the routers.
        settings: what the calibration was told.
        versions: package -> version at the time.
    """

    model: str
    layers: int
    exit: int
    epsilon: float
    samples: int
    loss: float
    per_layer: tuple[LayerExit, ...]
    confidence: float | None = None
    routers: tuple[RouterScore, ...] = ()
    config_hash: str = ""
    weights_hash: str = ""
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str | None] = field(default_factory=dict)

    def check(self, model: CutModel) -> None:
        """Raises :class:`ConfigError` unless the model has as many layers."""
        if self.layers != model.layers:
            raise ConfigError(
                f"this exit calibration of {self.model!r} is one of {self.layers} layers; {model.name} has "
                f"{model.layers}. Make one for it with: {MAKE}"
            )

    def origin(self, model: CutModel) -> str:
        """On what the calibrated layer rests, in a line of the report."""
        count = f"calibrated on {self.samples} samples"
        if self.confidence is None and self.exit < self.layers - 1:
            count += ", of which the share alone decided"
        if not self.weights_hash or "offloaded" in (self.weights_hash, model.weights_hash):
            return f"{count} of {self.model}; whether with these weights is not known"
        if self.weights_hash == model.weights_hash:
            return f"{count} with these weights"
        return f"{count} with other weights than these ({self.model})"

    def save(self, path: Path) -> None:
        """Writes the profile as JSON, one line per layer."""
        lines = [f"  {json.dumps(key)}: {_json(value)}" for key, value in asdict(self).items()]
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def calibrated_exit(changed: Sequence[float], first: int, epsilon: float) -> int:
    """The smallest layer l for which every layer from l on changes at most ``epsilon`` of the answers.

    Safety does not always grow with the layer, so a layer is not trusted while a later one is not safe.

    Args:
        changed: the share that changes, or an upper bound on it, for layer ``first`` to the last but one. The last
            layer is safe by itself: no layer follows it.
    """
    layer = first + len(changed)
    for share in reversed(changed):
        if share > epsilon + 1e-12:
            break
        layer -= 1
    return layer


def at_most(changed: int, samples: int, confidence: float) -> float:
    """The share of all prompts that change, at most: the exact (Clopper and Pearson) one-sided bound that holds with
    this confidence when ``changed`` of ``samples`` drawn ones did."""
    if changed >= samples:
        return 1.0
    low, high = changed / samples, 1.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        ways = (math.comb(samples, k) * middle**k * (1 - middle) ** (samples - k) for k in range(changed + 1))
        low, high = (middle, high) if sum(ways) > 1 - confidence else (low, middle)
    return high


def samples_needed(epsilon: float, confidence: float) -> int | None:
    """Samples of which none may change before ``epsilon`` can be trusted; None: no number of them is enough."""
    return math.ceil(math.log(1 - confidence) / math.log(1 - epsilon) - 1e-9) if epsilon > 0 else None


def load_exit_profile(path: str | Path) -> ExitProfile:
    """Reads ``dyvte.json``, or the one in a folder.

    Raises:
        ConfigError: no such file, or something else.
    """
    file = Path(path).expanduser()
    file = file / "dyvte.json" if file.is_dir() else file
    try:
        data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        known = {item.name for item in fields(ExitProfile)}
        given = {key: value for key, value in data.items() if key in known}
        given["per_layer"] = tuple(LayerExit(**one) for one in data["per_layer"])
        given["routers"] = tuple(RouterScore(**one) for one in data.get("routers", ()))
        profile = ExitProfile(**given)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"calibration={str(path)!r} cannot be read as an exit calibration ({error}); make one with: {MAKE}"
        ) from error
    if not 0 <= profile.exit < profile.layers:
        raise ConfigError(f"calibration={str(path)!r} names layer {profile.exit} of {profile.layers}; create it again.")
    return profile


def _json(value: Any) -> str:
    """JSON with one line per layer; named tuples become objects."""
    if isinstance(value, tuple):
        rows = [f"    {json.dumps(one._asdict())}" for one in value]
        return "[\n" + ",\n".join(rows) + "\n  ]" if rows else "[]"
    return json.dumps(value)
