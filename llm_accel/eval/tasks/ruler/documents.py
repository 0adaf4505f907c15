"""Questions about documents (SQuAD, HotpotQA): those that hold the answer stand among others, in random order.

The data sets are not part of the package. A file or data set has rows of one of these forms:

* ``{"question": ..., "answers": [...], "documents": [...], "more": [...]}``: ``documents`` hold the answer, ``more``
  (optional) are taken first where others are needed;
* SQuAD: ``{"question", "context", "answers": {"text": [...]}, "title"}``, or its original JSON file;
* HotpotQA: ``{"question", "answer", "context": [[title, [sentence, ...]], ...]}``, or ``{"title", "sentences"}``.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from llm_accel.errors import ConfigError
from llm_accel.eval.prompts.encoding import Encoder
from llm_accel.eval.prompts.template import PromptTemplate, Segment, TooShortError, last_tokens
from llm_accel.eval.rows import read_rows

_TASK = "Answer the question based on the given documents. Only give me the answer and do not output any other words."
_INTRO = f"{_TASK}\n\nThe following are given documents.\n\n"


@dataclass(frozen=True)
class DocumentQuestion:
    """A question, its answers, of which one suffices, and the indices of its documents."""

    text: str
    answers: tuple[str, ...]
    documents: tuple[int, ...]
    more: tuple[int, ...] = ()


@dataclass(frozen=True)
class DocumentBuilder:
    """Prompts of questions about documents; sample i asks question i."""

    encoder: Encoder
    questions: tuple[DocumentQuestion, ...]
    documents: tuple[str, ...]
    _encoded: dict[int, Segment] = field(default_factory=dict)
    _headings: list[Segment] = field(default_factory=list)

    def draw(self, rng: random.Random, sample: int, length: int) -> PromptTemplate:
        """The question of a sample; from the first one again after the last one."""
        question = self.questions[sample % len(self.questions)]
        return PromptTemplate(
            intro=_INTRO,
            fill=lambda size: self._fill(rng, size, question),
            question=f"{_TASK}\n\nQuestion: {question.text}",
            prefix="Answer:",
            answers=question.answers,
        )

    def _fill(self, rng: random.Random, size: int, question: DocumentQuestion) -> list[Segment]:
        """Documents up to ``size`` tokens; the first one, which loses its head, does not hold the answer."""
        held = set(question.documents)
        near = [i for i in question.more if i not in held]
        far = sorted(set(range(len(self.documents))) - held - set(near))
        rng.shuffle(near)
        rng.shuffle(far)
        others = near + far
        chosen = list(question.documents)
        total = sum(self._size(place, number) for place, number in enumerate(chosen))
        if total > size:
            raise TooShortError(total - size)
        if not others and total < size:
            raise ConfigError(f"qa: every document belongs to the question {question.text!r}; give more documents.")
        first = None
        while total < size:  # a file with few documents repeats them
            first = others[(len(chosen) - len(held)) % len(others)]
            total += self._size(len(chosen), first)
            chosen.append(first)
        rng.shuffle(chosen)
        if first is not None:
            place = chosen.index(first)
            chosen[0], chosen[place] = chosen[place], chosen[0]
        segments = [[*self._heading(place), *self._document(number)] for place, number in enumerate(chosen)]
        return last_tokens(segments, size)

    def _size(self, place: int, number: int) -> int:
        return len(self._heading(place)) + len(self._document(number))

    def _heading(self, place: int) -> Segment:
        have = len(self._headings)
        if place >= have:
            names = [f"Document {i + 1}:\n" for i in range(have, max(place + 1, 2 * have))]
            self._headings.extend(self.encoder.lines(names))
        return self._headings[place]

    def _document(self, number: int) -> Segment:
        if number not in self._encoded:
            (self._encoded[number],) = self.encoder.lines([self.documents[number] + "\n\n"])
        return self._encoded[number]


def load_questions(source: str, option: str, encoder: Encoder) -> DocumentBuilder:
    """Questions and documents of a file or a data set. Raises :class:`ConfigError`: it cannot be read, or a row has
    none of the forms above."""
    found: list[tuple[str, list[str], list[str], list[str]]] = []
    for i, row in enumerate(_flat(read_rows(source, option, "validation"))):
        try:
            read = _read(row)
        except (KeyError, TypeError, ValueError, IndexError):
            read = None
        if read is None:
            raise ConfigError(
                f"{option} {source!r}, row {i}: give question, answers and documents, or rows of SQuAD or HotpotQA."
            )
        if read[1]:  # SQuAD 2 has questions without an answer
            found.append(read)
    if not found:
        raise ConfigError(f"{option} {source!r} has no question with an answer.")
    documents = tuple(sorted({text for _, _, own, more in found for text in (*own, *more)}))
    number = {text: i for i, text in enumerate(documents)}
    questions = tuple(
        DocumentQuestion(
            text, tuple(answers), tuple(number[d] for d in dict.fromkeys(own)), tuple(number[d] for d in more)
        )
        for text, answers, own, more in found
    )
    return DocumentBuilder(encoder, questions, documents)


def _flat(rows: Iterable[Any]) -> list[dict[str, Any]]:
    """Rows, SQuAD's tree of titles and paragraphs laid flat; rows of SQuAD get the other paragraphs of their title."""
    flat: list[dict[str, Any]] = []
    for row in rows:
        if isinstance(row, dict) and "paragraphs" in row:
            flat += [
                {**asked, "context": paragraph["context"], "title": row.get("title")}
                for paragraph in row["paragraphs"]
                for asked in paragraph["qas"]
            ]
        else:
            flat.append(row)
    titles: dict[Any, dict[str, None]] = defaultdict(dict)
    for row in flat:
        if isinstance(row.get("context"), str):
            titles[row.get("title")][row["context"]] = None
    return [
        {**row, "more": [text for text in titles[row.get("title")] if text != row["context"]]}
        if isinstance(row.get("context"), str)
        else row
        for row in flat
    ]


def _read(row: dict[str, Any]) -> tuple[str, list[str], list[str], list[str]]:
    """Question, answers, documents that hold them, related documents."""
    context = row.get("context")
    if isinstance(context, str):  # SQuAD
        answers = row["answers"]
        texts = answers["text"] if isinstance(answers, dict) else [answer["text"] for answer in answers]
        return row["question"], list(texts), [context], row["more"]
    if context is not None:  # HotpotQA
        pairs = zip(context["title"], context["sentences"], strict=True) if isinstance(context, dict) else context
        return row["question"], [row["answer"]], [f"{title}\n{''.join(lines)}" for title, lines in pairs], []
    return row["question"], list(row["answers"]), list(row["documents"]), list(row.get("more", ()))
