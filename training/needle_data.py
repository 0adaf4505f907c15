"""Training and validation texts of the bundled needle model, as token arrays.

A *sample* is a haystack with needles and one or more questions with their answers, laid out as plain text or as a chat.
Every sample carries a loss weight per token (answers 1 and more, everything else 0 here, see the training loop).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerFast

from llm_accel.eval.prompts import grammar
from training import needle_tokenizer as nt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
_STOP_WEIGHT = 0.3  # loss weight of the full stop and the end token after a value


@dataclass(frozen=True)
class Mix:
    """What the texts of a curriculum stage are made of; shares are probabilities per text unless said otherwise."""

    needles: tuple[int, int] = (2, 3)  # lowest and highest number of needles
    questions: tuple[int, int] = (2, 3)
    repeat: float = 0.0  # random words with a repeated segment instead of a haystack
    easy: float = 0.0  # stepping stones: "opal1234567." or "opal is 1234567."
    direct: float = 0.0  # per question: only the answer prefix, no question
    other: float = 0.0  # number keys, word values, several keys or values per question
    first: float = 4.0  # loss weight of a value's first token
    fresh: bool = False  # new embeddings for key words at every step; common words are no keys


@dataclass
class Sample:
    """Token ids, loss weight of answer tokens, and where the last question's answer starts."""

    ids: Ints
    weight: Floats
    answer_start: int
    values: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Question:
    """The texts of one question: what is asked, how the answer begins, the answer and where values start in it."""

    text: str
    prefix: str
    values: list[str]


class Texts:
    """Makes samples. The sentence bank is tokenized once, so that generating data costs little beside training."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, seed: int, split: grammar.Split = "train", bank: int = 20000
    ) -> None:
        self.rng, self.split = random.Random(seed), split
        self._backend: Any = tokenizer.backend_tokenizer
        vocab = tokenizer.get_vocab()
        self.bos, self.eos, self.user, self.assistant = (vocab[t] for t in (nt.BOS, nt.EOS, nt.USER, nt.ASSISTANT))
        self.dot = vocab["."]
        self._bare = {i: vocab[word[1:]] for word, i in vocab.items() if word.startswith("Ġ") and word[1:] in vocab}
        self.bank = [self.encode(" " + s) for s in islice(grammar.filler_sentences(self.rng), bank)]
        self._words = [i for word, i in vocab.items() if word.startswith("Ġ") and len(word) > 1]
        self._numbers = [i for word, i in vocab.items() if word.isascii() and word.isdigit()]
        self.key_ids = [vocab["Ġ" + word] for word in (*grammar.TRAIN_KEYS, *grammar.TEST_KEYS)]

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, without bos."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def _keys(self, n: int, kind: grammar.Kind, fresh: bool) -> list[str]:
        if kind == "word" and self.split == "train" and not fresh:
            return self.rng.sample([*grammar.TRAIN_KEYS, *grammar.common_words()], n)
        return grammar.make_keys(self.rng, n, kind, self.split)

    def _facts(self, mix: Mix, n: int, n_questions: int) -> tuple[list[tuple[str, str]], list[Question], str]:
        """Needles as (key, sentence) in text order, questions with the last one about needle 0, and the style."""
        rng = self.rng
        if rng.random() < mix.easy:
            keys = self._keys(n, "word", mix.fresh)
            joint = rng.choice(["", " is "])
            values = [grammar.make_value(rng) for _ in keys]
            asked = [*rng.sample(range(1, n), min(n_questions, n) - 1), 0]
            facts = [(k, f" {k}{joint}{v}.") for k, v in zip(keys, values, strict=True)]
            return facts, [Question("", f" {keys[i]}{joint}", [values[i]]) for i in asked], "easy"
        other = rng.random() < mix.other
        value_kind: grammar.Kind = "word" if other and rng.random() < 0.25 else "number"
        keys = self._keys(n, "number" if other and rng.random() < 0.4 else "word", mix.fresh)
        if other and n > 3 and rng.random() < 0.4:  # one key gets two or three values
            for i in range(1, rng.choice([2, 3])):
                keys[i] = keys[0]
        facts = [(k, grammar.make_value(rng, value_kind)) for k in keys]
        by_key: dict[str, list[str]] = {}
        for k, v in facts:
            by_key.setdefault(k, []).append(v)
        names = list(by_key)
        asked_keys = [*rng.sample(names[1:], min(n_questions, len(names)) - 1), names[0]]
        questions = []
        for key in asked_keys:
            several = [key]
            single = [k for k in names if k != key and len(by_key[k]) == 1]
            if other and single and len(by_key[key]) == 1 and rng.random() < 0.3:
                several.append(rng.choice(single))
            m = len(by_key[key])
            questions.append(
                Question(
                    " " + grammar.question_text(several, value_kind, m),
                    " " + grammar.answer_prefix(several, value_kind, m),
                    [v for k in several for v in by_key[k]],
                )
            )
        return [(k, " " + grammar.needle_text(k, v, value_kind)) for k, v in facts], questions, value_kind

    def _tail(
        self, questions: Sequence[Question], mix: Mix, style: str, chat: bool
    ) -> tuple[list[int], list[float], int]:
        """Questions and answers: ids, loss weights, and where the last answer starts."""
        ids: list[int] = []
        weight: list[float] = []
        start = 0
        for i, q in enumerate(questions):
            ask = self.encode(q.text) if q.text else []
            prefix = self.encode(q.prefix)
            if ask and i < len(questions) - 1 and self.rng.random() < mix.direct:
                ask = []
            elif ask and chat:
                ask = ([] if i == 0 else [self.user, *self._start(ask)]) or ask
                ask, prefix = [*ask, self.assistant], self._start(prefix)
            ids += ask + prefix
            weight += [0.0] * (len(ask) + len(prefix))
            start = len(ids)
            space = " " if style == "word" else ""
            for j, value in enumerate(q.values):
                piece = self.encode(space + value if j == 0 else " " + value)
                head = len(piece) - len(self.encode(value)) if style != "word" else 0
                ids += piece
                weight += [1.0] * head + [mix.first] + [1.0] * (len(piece) - head - 1)
                rest = len(q.values) - 1 - j
                end = self.encode("." if rest == 0 else " and" if rest == 1 else ",")
                if rest == 0 and style != "easy":
                    end.append(self.eos)
                ids += end
                weight += [_STOP_WEIGHT] * len(end)
        return ids, weight, start

    def _start(self, ids: list[int]) -> list[int]:
        return [self._bare.get(ids[0], ids[0]), *ids[1:]]

    def sample(self, length: int, mix: Mix, depth: float | None = None, chat: bool | None = None) -> Sample:
        """A text of exactly ``length`` tokens; needle 0 (the last one asked) at ``depth`` in 0..1, or anywhere."""
        rng = self.rng
        if rng.random() < mix.repeat:
            return self.repeat(length)
        chat = rng.random() < 0.5 if chat is None else chat
        n, n_q = rng.randint(*mix.needles), rng.randint(*mix.questions)
        while True:
            facts, questions, style = self._facts(mix, n, n_q)
            tail, weight, start = self._tail(questions, mix, style, chat and style != "easy")
            needles = [self.encode(text) for _, text in facts]
            head = [self.bos, self.user] if chat else [self.bos]
            room = length - len(head) - len(tail) - sum(map(len, needles))
            if room >= 0:
                break
            n, n_q = (n, n_q - 1) if n_q > 1 else (n - 1, 1)
        sentences: list[list[int]] = []
        total = 0
        if style != "easy" and room > 200 and rng.random() < 0.3:
            sentences.append(self.encode(" " + nt.intro_text()))
            total = len(sentences[0])
        while total < room:
            sentences.append(rng.choice(self.bank))
            total += len(sentences[-1])
        if total > room:  # cut the head off the first sentence, so that every sentence still ends
            last = sentences.pop()[total - room :]
            if last:
                sentences.insert(0, last)
        slots = [rng.randint(0, len(sentences)) for _ in needles]
        if depth is not None:
            slots[0] = round(depth * len(sentences))
        if len({key for key, _ in facts}) < len(facts):
            slots.sort()  # several values of a key: the answer names them in text order
        hay: list[int] = []
        for i in range(len(sentences) + 1):
            for j in [j for j, slot in enumerate(slots) if slot == i]:
                hay += needles[j]
            hay += sentences[i] if i < len(sentences) else []
        ids = [*head, *self._start(hay), *tail]
        assert len(ids) == length
        before = length - len(tail)
        weights = np.array([0.0] * before + weight, np.float32)
        return Sample(np.array(ids), weights, before + start, questions[-1].values)

    def repeat(self, length: int) -> Sample:
        """Random words and number groups with a repeated segment: the classic induction task."""
        rng = self.rng

        def draw(n: int) -> list[int]:
            return [rng.choice(self._words if rng.random() < 0.5 else self._numbers) for _ in range(n)]

        if rng.random() < 0.5:  # a short segment again and again
            n = rng.randint(4, length // 3)
            seg = draw(n)
            ids = (seg * (length // n + 1))[: length - 1]
            weight = [0.0] * (n + 2) + [1.0] * (length - n - 2)
        else:
            n = rng.randint(6, min(length // 2 - 1, 100))
            gap = rng.randint(0, length - 2 * n - 1)
            seg = draw(n)
            ids = [*draw(length - 2 * n - gap - 1), *seg, *draw(gap), *seg]
            weight = [0.0] * (length - n + 1) + [1.0] * (n - 1)
        return Sample(np.array([self.bos, *ids]), np.array(weight, np.float32), length)

    def positions(self, ids: Ints, max_position: int) -> Ints:
        """Position ids with random skips at sentence ends (PoSE), so that short texts train long distances.

        Contiguous blocks, total range log-uniform up to ``max_position``; never inside a needle or a question.
        """
        rng, length = self.rng, len(ids)
        positions = np.arange(length)
        if max_position <= length:
            return positions
        if rng.random() < 0.3:
            return positions + (rng.randrange(max_position - length) if rng.random() < 0.5 else 0)
        span = int(np.exp(rng.uniform(np.log(length + 1), np.log(max_position))))
        ends = (np.flatnonzero((ids[:-1] == self.dot) & (ids[1:] != self.eos)) + 1).tolist()
        cuts = sorted(rng.sample(ends, min(rng.randint(1, 8), len(ends))))
        shares = np.array([rng.expovariate(1.0) for _ in range(len(cuts) + 1)])
        skips = np.floor(shares / shares.sum() * (span - length)).astype(np.int64)
        for cut, skip in zip(cuts, skips[1:], strict=True):
            positions[cut:] += skip
        return positions + (int(skips[0]) if rng.random() < 0.5 else 0)
