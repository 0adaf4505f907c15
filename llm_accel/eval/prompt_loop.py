"""The loop over the prompts of a run: every method on the same prompts, a record of each written at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Generic, Protocol, TypeVar

from llm_accel.common.progress import Progress
from llm_accel.eval.engine import Engine, Outcome, TokenPrompt
from llm_accel.eval.prompts.encoding import Encoder, Frame
from llm_accel.eval.records import Record, RunDir
from llm_accel.methods import MethodConfig

Configs = Mapping[str, Sequence[MethodConfig]]
PlaceT = TypeVar("PlaceT")
PromptT = TypeVar("PromptT", bound=TokenPrompt)


class HashedPrompt(TokenPrompt, Protocol):
    """A prompt that a record can name."""

    def digest(self) -> str: ...


class Maker(Protocol):
    """Whatever has made the prompts of a run."""

    @property
    def settings(self) -> Any: ...
    @property
    def encoder(self) -> Encoder: ...
    @property
    def frame(self) -> Frame: ...


@dataclass(frozen=True)
class Job(Generic[PlaceT, PromptT]):
    """What a command puts into the loop.

    Attributes:
        make: the prompt of a place.
        engine: what answers the prompts of a place.
        record: the record of a method, a prompt, its row in a batch, and what came out of the batch.
        key: what tells the records of a place apart, without the method: the rest of the directory's fields.
    """

    make: Callable[[PlaceT], PromptT]
    engine: Callable[[PlaceT], Engine]
    record: Callable[[str, PromptT, int, Outcome], Record]
    key: Callable[[PlaceT], tuple[Any, ...]]

    def lacking(
        self, wanted: Iterable[PlaceT], methods: Iterable[str], done: Sequence[Record], run_dir: RunDir
    ) -> dict[PlaceT, list[str]]:
        """Places of ``wanted`` with the methods that ``done`` has no record of; places that have all are left out."""
        keys, names = {run_dir.key(record) for record in done}, list(methods)
        missing = {place: [m for m in names if (m, *self.key(place)) not in keys] for place in wanted}
        return {place: left for place, left in missing.items() if left}


def run_batches(
    job: Job[PlaceT, PromptT],
    batches: Iterable[Sequence[PlaceT]],
    lacking: Mapping[PlaceT, Sequence[str]],
    configs: Configs,
    run_dir: RunDir,
    progress: Progress,
) -> None:
    """Runs the methods that each place lacks and appends to the directory. Prompts of a batch have one length and one
    engine."""
    for batch in batches:
        prompts = [job.make(place) for place in batch]
        engine = job.engine(batch[0])
        for method, config in configs.items():
            own = [p for p, place in zip(prompts, batch, strict=True) if method in lacking[place]]
            for part in _alike(own, engine.query_agnostic):
                outcome = engine.run(part, config)
                records = [job.record(method, prompt, i, outcome) for i, prompt in enumerate(part)]
                run_dir.append(records)
                progress.add(records, sum(len(prompt.ids) for prompt in part))


def base_record(
    maker: Maker, shard: tuple[int, int], method: str, prompt: HashedPrompt, row: int, outcome: Outcome
) -> Record:
    """What every record says of a prompt and a method: the answer and its cost; times are those of its batch."""
    ids = outcome.answers[row]
    return {
        "method": method,
        "query_agnostic": maker.settings.query_agnostic,
        "chat_template": maker.frame.chat,
        "answer": maker.encoder.decode(ids),
        "new_tokens": len(ids),
        "kv_bytes": outcome.kv_bytes,
        "dense_kv_bytes": outcome.dense_kv_bytes,
        "prefill_ms": round(outcome.prefill_ms, 3),
        "decode_ms_per_token": None if outcome.decode_ms is None else round(outcome.decode_ms, 3),
        "batch": len(outcome.answers),
        "prompt_hash": prompt.digest(),
        "seed": maker.settings.seed,
        "shard": f"{shard[0]}/{shard[1]}",
    }


def _alike(prompts: list[PromptT], query_agnostic: bool) -> list[list[PromptT]]:
    """One batch, or for two-step prompts one per context length, so that there is no padding either."""
    if not query_agnostic:
        return [prompts] if prompts else []
    ordered = sorted(prompts, key=lambda prompt: prompt.context_length)
    return [list(group) for _, group in groupby(ordered, key=lambda prompt: prompt.context_length)]
