"""The copy-paste detector on a grid of needle prompts: resumable, with a progress bar on stderr."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llm_accel.calibrate.heads.circuit import find_circuit
from llm_accel.calibrate.heads.copy_paste import Copies, copy_scores, value_span, watch_copies
from llm_accel.common.generation import end_tokens
from llm_accel.common.progress import bar
from llm_accel.errors import ConfigError
from llm_accel.eval.grid import places
from llm_accel.eval.prompts.maker import Prompt
from llm_accel.eval.records import Record, RunDir
from llm_accel.eval.tasks.needle.scoring import rouge1_recall
from llm_accel.eval.tasks.needle.settings import Settings
from llm_accel.eval.tasks.needle.task import NeedleMaker, NeedleTask
from llm_accel.methods.head_profile import RETRIEVES, Head
from llm_accel.patches.heads import model_heads

NAME = "copy_paste"
SUCCESS = 0.5  # ROUGE-1 recall above which a prompt counts as answered


@dataclass(frozen=True)
class Grid:
    """A model on the prompts of a needle grid."""

    model: Any
    tokenizer: Any
    maker: NeedleMaker
    settings: Settings

    def prompts(self) -> list[Prompt]:
        """Every prompt of the grid, shortest first."""
        settings = self.settings
        return [self.maker.make(place) for place in places(settings.lengths, settings.depths, settings.samples)]

    def run(self, run_dir: RunDir, done: Sequence[Record]) -> list[Record]:
        """Watches what is not in ``done`` yet, writes a record of each prompt at once, returns all of them."""
        records = list(done)
        known = {run_dir.key(record) for record in done}
        todo = [prompt for prompt in self.prompts() if (NAME, *prompt.key) not in known]
        if done:
            print(f"{run_dir.path}: {len(done)} prompts are there, {len(todo)} to do", file=sys.stderr)
        ends = end_tokens(self.model, self.tokenizer)
        with bar(len(todo), "prompt") as counter:
            for prompt in todo:
                spans = [
                    value_span(self.maker.encoder.decode, prompt.ids, first, value)
                    for first, value in zip(prompt.needles, prompt.expected, strict=True)
                ]
                copies = watch_copies(self.model, prompt.ids, spans, self.maker.max_new_tokens, ends)
                record = self._record(prompt, copies)
                run_dir.append([record])
                records.append(record)
                counter.update(1)
        return records

    def _record(self, prompt: Prompt, copies: Copies) -> Record:
        answer = self.maker.encoder.decode(copies.answer)
        return {
            **dict(zip(NeedleTask.fields, (NAME, *prompt.key), strict=True)),
            "success": rouge1_recall(answer, " ".join(prompt.expected)) > SUCCESS,
            "text": answer,
            "answer": list(copies.answer),
            "size": copies.size,
            "hits": [[*place, count] for place, count in sorted(copies.hits.items())],
        }

    def scores(self, records: Sequence[Record], compat: bool) -> tuple[Any, int]:
        """Query-head scores [L, Hq] and the number of prompts behind them.

        Raises:
            ConfigError: no prompt was answered, so that nothing can be said about heads.
        """
        answered = [record for record in records if record["success"]]
        if not answered:
            raise ConfigError(
                f"the model answered none of {len(records)} prompts, and only answers tell which heads copy; give "
                "other --lengths or --needles, or use --detector induction."
            )
        return copy_scores(self.model, [_copies(record) for record in answered], compat), len(answered)

    def circuit(self, records: Sequence[Record], scores: Any, count: int) -> list[Head]:
        """See :func:`find_circuit`, on the first ``count`` answered prompts of the shortest length."""
        answered = {tuple(r[field] for field in NeedleTask.fields): r for r in records if r["success"]}
        pairs: list[tuple[Sequence[int], Sequence[int]]] = []
        for prompt in self.prompts():
            record = answered.get((NAME, *prompt.key))
            if record is not None and len(pairs) < count:
                pairs.append((prompt.ids, record["answer"]))
        heads = model_heads(self.model)
        found = [(int(layer), int(head)) for layer, head in (scores >= RETRIEVES).nonzero().tolist()]
        with bar(heads.layers * heads.query_heads, "head") as counter:
            return find_circuit(self.model, pairs, found, tick=counter.update)


def _copies(record: Record) -> Copies:
    hits = {(layer, head, place): count for layer, head, place, count in record["hits"]}
    return Copies(tuple(record["answer"]), record["size"], hits)
