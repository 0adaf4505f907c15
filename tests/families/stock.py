"""The model without a plug-in: what it answers, and which calls it can do at all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedModel

from tests.families.calls import NEW, Prompt, difference, forced, padded, two_turns
from tests.families.oracle import HidingAttention, hiding

EXACT = 1e-5
# the stock model and the oracle add up in another order: how many times that difference is still rounding
NOISE = 4
# a difference above it with nothing hidden is no rounding: the oracle's attention is not that of the model
TOO_MUCH = 1e-3
CHUNK = 16
MORE = (1, 2, 3)  # tokens of padding
SECOND, CHUNKS = "second turn", "chunks"


class CannotRun(Exception):
    """The stock model itself fails."""


@dataclass
class Stock:
    """Answers of the stock model.

    Attributes:
        model: in eval mode.
        single: one row.
        batch: it and shorter ones, padded on the left.
        answers: call -> logits; a call that the stock model cannot do, or answers differently than in one piece, is
            missing. Calls: a shape, ``single`` or ``padded``, alone or with ``SECOND`` or ``CHUNKS``.
        kv_heads: layer -> heads of its cache, of the layers that hold keys.
        bar: differences of logits, relative to the largest, that are above it are no rounding: 1e-5, or more where the
            same attention in another order of sums makes more.
        oracle: whether the oracle's attention with nothing hidden is that of the model.
        independent: whether a padded row is answered as the row alone, however much padding there is.
        notes: what it cannot do.
    """

    model: PreTrainedModel
    single: Prompt
    batch: Prompt
    answers: dict[str, Tensor] = field(default_factory=dict)
    kv_heads: dict[int, int] = field(default_factory=dict)
    bar: float = EXACT
    oracle: bool = True
    independent: bool = False
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, model: PreTrainedModel, batch: Prompt | None = None) -> Stock:
        """Asks the model. The first row of the batch is the longest.

        Raises:
            CannotRun: the model cannot answer one row.
        """
        batch = padded() if batch is None else batch
        stock = cls(model, batch.row(0), batch)
        try:
            stock.answers["single"], cache, _ = forced(model, stock.single.ids, None, NEW, None, **stock.single.extra)
        except Exception as error:
            raise CannotRun(f"{type(error).__name__}: {first_line(error)}") from error
        for index, layer in enumerate(getattr(cache, "layers", ())):
            if getattr(layer, "keys", None) is not None:
                stock.kv_heads[index] = layer.keys.shape[1]
        stock._ask()
        stock._measure()
        return stock

    def prompt_of(self, shape: str) -> Prompt:
        """The prompt of a shape."""
        return self.single if shape == "single" else self.batch

    def shapes(self) -> list[tuple[str, int]]:
        """(shape, turns) of what the stock model can do."""
        return [
            (shape, 2 if f"{shape}, {SECOND}" in self.answers else 1)
            for shape in ("single", "padded")
            if shape in self.answers
        ]

    def _ask(self) -> None:
        for shape in ("single", "padded"):
            batch = self.prompt_of(shape)
            for name, turns, more in (
                (shape, 1, {}),
                (f"{shape}, {SECOND}", 2, {}),
                (f"{shape}, {CHUNKS}", 1, {"prefill_chunk_size": CHUNK}),
            ):
                if batch.extra and name != shape:  # where images stand in later calls is asked of text families
                    continue
                try:
                    if name not in self.answers:
                        self.answers[name] = two_turns(self.model, batch, turns=turns, **more)
                except Exception as error:  # the stock model's own limit
                    self.notes.append(f"{name}: {type(error).__name__}: {first_line(error)}")

    def _measure(self) -> None:
        """The bar, and which calls differ in the stock model itself."""
        try:
            with hiding(self.model, HidingAttention()):
                noise = difference(two_turns(self.model, self.single, turns=1), self.answers["single"])
        except Exception:  # attention that cannot be exchanged; what apply says of it is judged all the same
            noise = float("inf")
        self.oracle = noise <= TOO_MUCH
        if self.oracle:
            self.bar = max(EXACT, NOISE * noise)
        for shape in ("single", "padded"):
            chunks = self.answers.get(f"{shape}, {CHUNKS}")
            if chunks is not None and (found := difference(chunks, self.answers[shape])) > self.bar:
                self.notes.append(f"{shape}, {CHUNKS}: differs from the prompt in one call by {found:.1e}")
                del self.answers[f"{shape}, {CHUNKS}"]
        if "padded" in self.answers:
            shortest = two_turns(self.model, self.batch.row(len(self.batch.lengths) - 1), turns=1)
            together = [self.answers["padded"], *self._more_padded()]
            found = max(
                *(difference(answers[:1], self.answers["single"]) for answers in together),
                *(difference(answers[-1:], shortest) for answers in together),
            )
            self.independent = found <= self.bar
            if not self.independent:
                self.notes.append(f"padded: a row differs from the row alone by {found:.1e}")

    def _more_padded(self) -> Iterator[Tensor]:
        """The answers behind more padding, of which rows get more or less where visual tokens leave: a recurrent layer
        works in chunks, which then begin at other tokens."""
        for count in MORE if self.batch.extra else ():
            try:
                yield two_turns(self.model, self.batch.more_padded(count), turns=1)
            except Exception:  # padding that the stock model does not take is not asked for by a method either
                return


def first_line(error: BaseException) -> str:
    """The message in short."""
    return (str(error).strip().splitlines() or [""])[0][:200]
