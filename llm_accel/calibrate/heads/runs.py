"""The copy-paste detector on a grid of needle prompts: a task of the frame, so that it can be resumed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llm_accel.calibrate.heads.circuit import find_circuit
from llm_accel.calibrate.heads.copy_paste import Copies, find_copies, mean_share, value_span
from llm_accel.common.generation import end_tokens
from llm_accel.errors import ConfigError
from llm_accel.eval.grid import GridPoint
from llm_accel.eval.prompts.maker import TextPrompt
from llm_accel.eval.records import Record
from llm_accel.eval.tasks.needle.scoring import rouge1_recall
from llm_accel.eval.tasks.needle.task import NeedleMaker, NeedleTask
from llm_accel.methods import MethodConfig
from llm_accel.methods.kv.head_profile import RETRIEVES, Head
from llm_accel.patches.heads import model_heads

NAME = "copy_paste"
SUCCESS = 0.5  # ROUGE-1 recall above which a prompt counts as answered


class CopyTask(NeedleTask):
    """Needle prompts, and which heads copy their answers."""

    score, unit = "success", "prompt"

    def __init__(self, model: Any, tokenizer: Any, maker: NeedleMaker) -> None:
        self.settings, self.model, self.maker, self.name = maker.settings, model, maker, maker.settings.model_name
        self.configs, self.ends = {NAME: ()}, end_tokens(model, tokenizer)

    def size(self, item: GridPoint) -> int:
        return 1

    def announce(self, lacking: Mapping[GridPoint, Sequence[str]]) -> None:
        """Nothing: the progress bar shows it."""

    def calls(self, prompts: Sequence[TextPrompt], configs: Sequence[MethodConfig]) -> Iterable[Sequence[TextPrompt]]:
        return [[prompt] for prompt in prompts]

    def answer(self, prompts: Sequence[TextPrompt], configs: Sequence[MethodConfig]) -> Any:
        (prompt,) = prompts
        spans = [
            value_span(self.maker.encoder.decode, prompt.ids, first, value)
            for first, value in zip(prompt.needles, prompt.expected, strict=True)
        ]
        return find_copies(self.model, prompt.ids, spans, prompt.new_tokens, self.ends)

    def record(self, prompt: TextPrompt, row: int, outcome: Any) -> Record:
        answer = self.maker.encoder.decode(outcome.answer)
        return {
            **dict(zip(self.fields[1:], prompt.key, strict=True)),
            "success": rouge1_recall(answer, " ".join(prompt.expected)) > SUCCESS,
            "text": answer,
            "answer": list(outcome.answer),
            "size": outcome.size,
            "hits": [[*place, count] for place, count in sorted(outcome.hits.items())],
        }

    def head_scores(self, records: Sequence[Record], compat: bool) -> tuple[Any, int]:
        """Query-head scores [L, Hq] and the number of prompts behind them. Raises :class:`ConfigError`: no prompt was
        answered, so that heads cannot be scored."""
        answered = [record for record in records if record["success"]]
        if not answered:
            raise ConfigError(
                f"the model answered none of {len(records)} prompts, and only answers tell which heads copy; give "
                "other --lengths or --needles, or use --detector induction."
            )
        heads, copies = model_heads(self.model), [_copies(record) for record in answered]
        return mean_share(copies, heads.layers, heads.query_heads, compat), len(answered)

    def circuit(self, records: Sequence[Record], scores: Any, count: int) -> list[Head]:
        """See :func:`find_circuit`, on the first ``count`` answered prompts of the shortest length."""
        answers = {tuple(r[field] for field in self.fields[1:]): r["answer"] for r in records if r["success"]}
        found = [point for point in self.items() if point.key in answers][:count]
        pairs = [(self.maker.make(point).ids, answers[point.key]) for point in found]
        retrieval = [(int(layer), int(head)) for layer, head in (scores >= RETRIEVES).nonzero().tolist()]
        return find_circuit(self.model, pairs, retrieval)


def _copies(record: Record) -> Copies:
    hits = {(layer, head, place): count for layer, head, place, count in record["hits"]}
    return Copies(tuple(record["answer"]), record["size"], hits)
