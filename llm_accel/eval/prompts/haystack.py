"""Sentences to hide needles in: the built-in grammar, text files, or a ``datasets`` dataset."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from llm_accel.errors import ConfigError
from llm_accel.eval.prompts import grammar
from llm_accel.eval.prompts.encoding import Encoder
from llm_accel.eval.rows import DatasetSource

BUILT_IN = "grammar"
SUFFIXES = (".txt", ".md")
_GRAMMAR_SENTENCES = 8192
_GRAMMAR_SEED = 20240406
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])\s*")
_MAX_SENTENCE = 1000  # characters; longer ones (tables, code) are cut at spaces
_FORMS = "a text file, a folder with .txt or .md files, dataset:NAME[,split=train,column=text,config=NAME], or grammar"


@dataclass(frozen=True)
class Haystack:
    """Encoded sentences.

    Attributes:
        sentences: token ids of each sentence as it stands after another one.
        coherent: whether their order means something; a prompt then takes a run of them from a random position on,
            beginning again after the last one. Otherwise each one is drawn.
        source: what ``--haystack`` said.
    """

    sentences: tuple[tuple[int, ...], ...]
    coherent: bool
    source: str

    @property
    def tokens(self) -> int:
        """Tokens of all sentences; a longer prompt repeats them."""
        return sum(map(len, self.sentences))

    def digest(self) -> str:
        """Hash of the encoded text, 16 hex digits."""
        return hashlib.sha256(repr(self.sentences).encode()).hexdigest()[:16]

    def draw(self, rng: random.Random) -> Iterator[tuple[int, ...]]:
        """Endless sentences for one prompt."""
        count = len(self.sentences)
        place = rng.randrange(count)
        while True:
            yield self.sentences[place]
            place = (place + 1) % count if self.coherent else rng.randrange(count)


def load_haystack(source: str, encoder: Encoder, tokens: int) -> Haystack:
    """Reads and encodes a source until it has ``tokens`` tokens or ends. Raises :class:`ConfigError`: the source cannot
    be read, holds no text, or needs a package that is not installed."""
    if source == BUILT_IN:
        stream = grammar.filler_sentences(random.Random(_GRAMMAR_SEED))
        texts: Iterable[str] = islice(stream, _GRAMMAR_SENTENCES)
    elif source.startswith("dataset:"):
        texts = _split(_dataset_texts(source))
    else:
        texts = _split(_file_texts(source))
    sentences: list[tuple[int, ...]] = []
    total = 0
    stream = iter(texts)
    while batch := list(islice(stream, 1024)):
        for ids in encoder.continuations(batch):
            if ids:
                sentences.append(tuple(ids))
                total += len(ids)
        if source != BUILT_IN and total >= tokens:
            break
    if not sentences:
        raise ConfigError(f"--haystack {source!r} holds no text; give {_FORMS}.")
    return Haystack(tuple(sentences), coherent=source != BUILT_IN, source=source)


def _split(texts: Iterable[str]) -> Iterator[str]:
    """Sentences with white space normalized; overlong ones are cut at spaces."""
    for text in texts:
        for sentence in _SENTENCE_END.split(" ".join(text.split())):
            while len(sentence) > _MAX_SENTENCE:
                cut = sentence.rfind(" ", 1, _MAX_SENTENCE)
                cut = cut if cut > 0 else _MAX_SENTENCE
                yield sentence[:cut].strip()
                sentence = sentence[cut:].strip()
            if sentence.strip():
                yield sentence.strip()


def _file_texts(source: str) -> Iterator[str]:
    path = Path(source).expanduser()
    if not path.exists():
        raise ConfigError(f"--haystack {source!r}: no such file or folder; give {_FORMS}.")
    files = [path]
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not files:
        raise ConfigError(f"--haystack {source!r}: the folder holds no {' or '.join(SUFFIXES)} file.")
    for file in files:
        try:
            yield file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"--haystack {str(file)!r} is not UTF-8 text ({error}); convert it first.") from error
        except OSError as error:
            raise ConfigError(f"--haystack {str(file)!r} cannot be read: {error.strerror}.") from error


def _dataset_texts(source: str) -> Iterator[str]:
    dataset = DatasetSource.parse(source, "--haystack", _FORMS, split="train", column="text")
    column = dataset.options["column"]
    for row in dataset.rows(streaming=True):
        if column not in row:
            raise ConfigError(f"--haystack {source!r}: no column {column!r}; columns are {', '.join(row)}.")
        yield str(row[column])
