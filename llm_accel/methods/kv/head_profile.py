"""What is known about the heads of a model: a score per query head and per KV head, in a JSON file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from llm_accel.errors import ConfigError

RETRIEVES = 0.1  # copy-paste score from which a head counts as a retrieval head (arXiv 2404.15574)
INDUCTION_SHARE = 0.15  # 2407.15891
GROUPED_INDUCTION_SHARE = 0.35  # a KV head serves several query heads of which one may retrieve; see docs/heads.md
ECHO_SHARE = (
    1 / 15
)  # of the heads kept by the data-free detector: 1 % by echo in addition to 14 % by induction (2407.15891)

Head = tuple[int, int]
Scores = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class HeadProfile:
    """Scores of one model's heads.

    Attributes:
        model: name of the model.
        method: how they were found: "induction", "copy_paste" or "gates" (DuoAttention).
        q_head_scores: [L, Hq].
        kv_head_scores: [L, Hk]; the maximum over the query heads of a KV head, or the gates themselves.
        echo_scores: [L, Hk], mass on the same token in earlier segments; from the data-free detector only.
        circuit: (layer, query head) that answers depend on; None where it was not measured.
        n_instances: samples that the scores are the mean of.
        seed: seed of those samples.
        config_hash, weights_hash: fingerprints of the model; empty where unknown.
        versions: package -> version at the time.
        settings: what the detector was told.
    """

    model: str
    method: str
    q_head_scores: Scores
    kv_head_scores: Scores
    echo_scores: Scores = ()
    circuit: tuple[Head, ...] | None = None
    n_instances: int = 0
    seed: int = 0
    config_hash: str = ""
    weights_hash: str = ""
    versions: dict[str, str | None] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def layers(self) -> int:
        """Number of layers L."""
        return len(self.q_head_scores)

    @property
    def shape(self) -> tuple[int, int, int]:
        """L, Hq, Hk."""
        return self.layers, len(self.q_head_scores[0]), len(self.kv_head_scores[0])

    def check(self, layers: int, query_heads: int, kv_heads: int) -> None:
        """Raises :class:`ConfigError` unless the profile is one of a model with these counts."""
        if self.shape != (layers, query_heads, kv_heads):
            have = "{} layers, {} query heads and {} KV heads".format(*self.shape)
            raise ConfigError(
                f"this head profile of {self.model!r} has {have}; the model has {layers}, {query_heads} and {kv_heads}."
                " Make one for it with: llm-accel heads --model NAME --out DIR"
            )

    def query_heads(self) -> list[Head]:
        """(layer, query head) by falling score; equal ones by layer, then head."""
        return _ranked(self.q_head_scores, range(self.layers))

    def detected(self) -> list[Head]:
        """The retrieval heads among the query heads: those with a copy-paste score of at least ``RETRIEVES``, or for
        other detectors the top 5 %, at least one."""
        ranked = self.query_heads()
        if self.method == "copy_paste":
            return [(layer, head) for layer, head in ranked if self.q_head_scores[layer][head] >= RETRIEVES]
        return ranked[: max(1, round(0.05 * len(ranked)))]

    def full_share(self, layers: Iterable[int]) -> float:
        """Share of the KV heads of these layers that keep everything unless the user says otherwise."""
        chosen = list(layers)
        _, query_heads, kv_heads = self.shape
        if self.method == "induction":
            return INDUCTION_SHARE if query_heads == kv_heads else GROUPED_INDUCTION_SHARE
        if self.method == "gates":
            return 0.25 if query_heads == kv_heads else 0.5
        hits = sum(score >= RETRIEVES for layer in chosen for score in self.kv_head_scores[layer])
        return max(0.25, hits / max(1, len(chosen) * kv_heads))

    def full_heads(self, share: float, layers: Iterable[int]) -> list[Head]:
        """The (layer, KV head) of these layers that keep everything: the best ``share``, by score over the whole
        model, so that layers get unequal numbers. With data-free scores, a fifteenth is chosen by echo."""
        chosen = list(layers)
        ranked = _ranked(self.kv_head_scores, chosen)
        count = math.ceil(share * len(ranked) - 1e-9)
        if not self.echo_scores:
            return ranked[:count]
        echo = _ranked(self.echo_scores, chosen)[: math.ceil(ECHO_SHARE * count - 1e-9)]
        return (echo + [head for head in ranked if head not in echo])[:count]

    def save(self, path: Path) -> None:
        """Writes the profile as JSON."""
        lines = [f"  {json.dumps(key)}: {_json_lines(value)}" for key, value in asdict(self).items()]
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _json_lines(value: Any) -> str:
    """JSON with one line per layer of a table."""
    if isinstance(value, tuple) and value and isinstance(value[0], tuple) and isinstance(value[0][0], float):
        return "[\n" + ",\n".join(f"    {json.dumps(row)}" for row in value) + "\n  ]"
    return json.dumps(value)


def _ranked(scores: Scores, layers: Iterable[int]) -> list[Head]:
    heads = [(layer, head) for layer in layers for head in range(len(scores[layer]))]
    return sorted(heads, key=lambda at: (-scores[at[0]][at[1]], at))


def load_profile(path: str | Path, query_heads: int | None = None) -> HeadProfile:
    """Reads a profile, or a DuoAttention pattern: lines of tab-separated gates, one line per layer.

    Args:
        query_heads: Hq of the model, which a pattern does not tell; each gate stands for its whole group.

    Raises:
        ConfigError: no such file, or not one of the two forms.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        file = next(
            (file / name for name in ("heads.json", "full_attention_heads.tsv") if (file / name).is_file()), file
        )
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"heads={str(path)!r} cannot be read ({error}); {_FORMS}") from error
    try:
        return _from_json(json.loads(text)) if text.lstrip().startswith("{") else _from_gates(file, text, query_heads)
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"heads={str(path)!r} is no head profile ({error}); {_FORMS}") from error


_FORMS = "give a heads.json written by `llm-accel heads` or a DuoAttention pattern (one line of gates per layer)."


def _from_json(data: dict[str, Any]) -> HeadProfile:
    known = {item.name for item in fields(HeadProfile)}
    given = {key: value for key, value in data.items() if key in known}
    for name in ("q_head_scores", "kv_head_scores", "echo_scores"):
        given[name] = _table(given.get(name) or ())
    if not given["q_head_scores"] or len(given["q_head_scores"]) != len(given["kv_head_scores"]):
        raise ValueError("q_head_scores and kv_head_scores must have one line per layer")
    if given.get("circuit") is not None:
        given["circuit"] = tuple((int(layer), int(head)) for layer, head in given["circuit"])
    return HeadProfile(**given)


def _from_gates(file: Path, text: str, query_heads: int | None) -> HeadProfile:
    gates = _table([line.split() for line in text.splitlines() if line.strip()])
    if not gates:
        raise ValueError("it is empty")
    heads = len(gates[0])
    group = 1 if query_heads is None or query_heads % heads else query_heads // heads
    per_query = tuple(tuple(gate for gate in row for _ in range(group)) for row in gates)
    return HeadProfile(model=file.parent.name, method="gates", q_head_scores=per_query, kv_head_scores=gates)


def _table(rows: Iterable[Iterable[Any]]) -> Scores:
    """Numbers in lines of equal length."""
    table = tuple(tuple(float(value) for value in row) for row in rows)
    if any(not row or len(row) != len(table[0]) for row in table):
        raise ValueError("the lines have different lengths")
    if not all(math.isfinite(value) for row in table for value in row):
        raise ValueError("a score is not finite")
    return table
