"""One family, every method: right or refused, in each call that the stock model itself can do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import llm_accel
from llm_accel import LlmAccelError
from llm_accel.methods import MethodConfig, StepEviction
from tests.families.calls import LENGTH, NEW, Prompt, difference, padded, two_turns
from tests.families.methods import BELOW, METHODS, WHOLE, sparse_at_any_length
from tests.families.oracle import HidingAttention, Kept, PromptKept, Shown, StepKept, hiding, kept_now
from tests.families.verdict import FAILS, REFUSED, RIGHT, WRONG, Verdict
from tests.patches.calls import Outside

EXACT = 1e-5
# the attention of the stock model and that of the oracle add up in another order: how much more than that may differ
NOISE = 4
CHUNK = 16


@dataclass
class Stock:
    """The model without a plug-in, and what it answers.

    Attributes:
        model: in eval mode.
        single: one row of ``LENGTH`` tokens.
        batch: it and shorter ones, padded on the left.
        answers: shape -> logits; a shape that the stock model cannot do is missing.
        bar: differences above it are no rounding.
        notes: what it cannot do.
    """

    model: PreTrainedModel
    single: Prompt
    batch: Prompt
    answers: dict[str, Tensor] = field(default_factory=dict)
    bar: float = EXACT
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, model: PreTrainedModel) -> Stock:
        batch = padded()
        stock = cls(model, batch.row(0), batch)
        stock.answers["single"] = two_turns(model, stock.single, turns=1)
        for name, call in (
            ("single, second turn", lambda: two_turns(model, stock.single)),
            ("padded", lambda: two_turns(model, batch, turns=1)),
            ("padded, second turn", lambda: two_turns(model, batch)),
            ("single, chunks", lambda: two_turns(model, stock.single, turns=1, prefill_chunk_size=CHUNK)),
            ("padded, chunks", lambda: two_turns(model, batch, turns=1, prefill_chunk_size=CHUNK)),
        ):
            try:
                stock.answers[name] = call()
            except Exception as error:  # the stock model's own limit
                stock.notes.append(f"stock, {name}: {type(error).__name__}: {_first_line(error)}")
        stock._measure()
        return stock

    def _measure(self) -> None:
        """The bar, from the stock model under the oracle's attention with nothing hidden; and which calls differ in the
        stock model itself: chunks from the whole prompt, a padded row from the row alone."""
        with hiding(self.model, HidingAttention()):
            plain = two_turns(self.model, self.single, turns=1)
        noise = difference(plain, self.answers["single"])
        if noise > 1e-3:
            self.notes.append(f"oracle with nothing hidden differs from the stock model by {noise:.1e}")
        self.bar = max(EXACT, NOISE * noise) if noise <= 1e-3 else EXACT
        for name in ("single", "padded"):
            chunks = self.answers.get(f"{name}, chunks")
            if chunks is not None and (found := difference(chunks, self.answers[name])) > self.bar:
                self.notes.append(f"stock, {name}, chunks: differs from the prompt in one call by {found:.1e}")
                del self.answers[f"{name}, chunks"]
        if "padded" in self.answers:
            found = difference(self.answers["padded"][:1], self.answers["single"])
            shortest = two_turns(self.model, self.batch.row(2), turns=1)
            found = max(found, difference(self.answers["padded"][2:], shortest))
            self.independent = found <= self.bar
            if not self.independent:
                self.notes.append(f"stock, padded: a row differs from the row alone by {found:.1e}")

    independent: bool = True

    def prompt_of(self, shape: str) -> Prompt:
        return self.single if shape == "single" else self.batch


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


class Difference(Exception):
    """Ours is not what it should be."""


@dataclass
class Trial:
    """The calls of one method on one family."""

    stock: Stock
    make: Callable[[], MethodConfig]
    error: float = 0.0
    refusals: dict[str, list[str]] = field(default_factory=dict)
    done: int = 0

    def compare(self, call: str, ours: Tensor, reference: Tensor) -> None:
        found = difference(ours, reference)
        self.error = max(self.error, found)
        if not found <= self.stock.bar:
            raise Difference(f"{call}: logits off by {found:.1e} of the largest (allowed: {self.stock.bar:.0e})")

    def call(self, name: str, run: Callable[[], None]) -> None:
        """One kind of call; one that our own error refuses is noted."""
        try:
            run()
            self.done += 1
        except LlmAccelError as error:
            self.refusals.setdefault(f"{type(error).__name__}: {_first_line(error)}", []).append(name)
        except Difference:
            raise
        except Exception as error:
            raise RuntimeError(f"{name}: {type(error).__name__}: {_first_line(error)}") from error


def judge(stock: Stock, method: str) -> Verdict:
    """Every call of one method; the model is as before afterwards."""
    outside = Outside.of(stock.model)
    refused: Verdict | None = None
    trial = Trial(stock, WHOLE[method])
    try:
        verdict = _judge_calls(stock, method, trial)
    except LlmAccelError as error:
        refused = verdict = Verdict(REFUSED, f"{type(error).__name__}: {error}")
    except Difference as error:
        verdict = Verdict(WRONG, str(error))
    except Exception as error:
        verdict = Verdict(FAILS, str(error))
    verdict.error = trial.error if refused is None else None
    verdict.notes += [f"{'; '.join(calls)}: {why}" for why, calls in trial.refusals.items()]
    verdict = _untouched(stock, outside, verdict)
    return verdict


def _untouched(stock: Stock, outside: Outside, verdict: Verdict) -> Verdict:
    """Nothing of the plug-in is left: no hook, no changed configuration, the same bits."""
    left = Outside.of(stock.model) != outside
    again = None if left else two_turns(stock.model, stock.single, turns=1)
    if left or not torch.equal(again, stock.answers["single"]):
        llm_accel.remove(stock.model)
        what = "the model is not as before" if left else "logits are not bit-identical"
        return Verdict(WRONG, f"after {'a refusal' if verdict.status == REFUSED else 'remove'}: {what}; {verdict.why}")
    return verdict


def _judge_calls(stock: Stock, method: str, trial: Trial) -> Verdict:
    with llm_accel.apply(stock.model, WHOLE[method]()):  # a refusal at apply is one of the method, not of a call
        pass
    if method == "hip":
        with sparse_at_any_length():
            _above(stock, trial)
    else:
        _above(stock, trial)
    if method in BELOW:
        trial.make = BELOW[method]
        _below(stock, trial)
    if not trial.done:
        return Verdict(FAILS, f"accepted by apply, then every call is refused: {next(iter(trial.refusals))}")
    return Verdict(RIGHT)


def _shapes(stock: Stock, wanted: str = "") -> list[tuple[str, int]]:
    """(shape, turns) of the calls that the stock model can do."""
    shapes = []
    for shape in ("single", "padded"):
        if shape in stock.answers:
            shapes.append((shape, 2 if f"{shape}, second turn" in stock.answers else 1))
    return shapes


def _above(stock: Stock, trial: Trial) -> None:
    """A budget that covers everything: tokens and logits of the dense model."""
    with llm_accel.apply(stock.model, trial.make()):
        for shape, turns in _shapes(stock):
            name = f"{shape}, nothing to cut"
            reference = stock.answers[f"{shape}, second turn" if turns == 2 else shape]
            trial.call(
                name,
                lambda shape=shape, turns=turns, reference=reference, name=name: trial.compare(
                    name, two_turns(stock.model, stock.prompt_of(shape), turns=turns), reference
                ),
            )


def _below(stock: Stock, trial: Trial) -> None:
    for shape, turns in _shapes(stock):
        trial.call(f"{shape}", lambda shape=shape, turns=turns: _against_oracle(stock, trial, shape, turns))
        if f"{shape}, chunks" in stock.answers:
            trial.call(
                f"{shape}, chunks",
                lambda shape=shape: _against_oracle(stock, trial, shape, 1, prefill_chunk_size=CHUNK),
            )
    if "padded" in stock.answers and stock.independent:
        trial.call("rows alone", lambda: _rows_alone(stock, trial))


def _rows_alone(stock: Stock, trial: Trial) -> None:
    """A row of a padded batch against the row alone."""
    with llm_accel.apply(stock.model, trial.make()):
        together = two_turns(stock.model, stock.batch, turns=1)
        for row in (0, 1):
            alone = two_turns(stock.model, stock.batch.row(row), turns=1)
            trial.compare(f"padded, row {row} against the row alone", together[row : row + 1], alone)


def _against_oracle(stock: Stock, trial: Trial, shape: str, turns: int, **more: Any) -> None:
    """Logits of ours against the stock model that hides what the reports say was evicted, call by call."""
    config, batch = trial.make(), stock.prompt_of(shape)
    kept: list[Kept] = []
    with llm_accel.apply(stock.model, config, trace=True) as handle:
        ours = two_turns(stock.model, batch, lambda step: kept.append(kept_now(handle.report())), turns, **more)
        evicted = any(layer.evicted for layer in handle.report().layers)
    name = ", ".join([shape, *more])
    if not evicted or not kept[0]:
        raise Difference(f"{name}: nothing was evicted of {LENGTH} tokens under {config.spec()}")
    attention = HidingAttention()

    def after(step: int) -> None:
        attention.shown = _shown(config, kept, step + 1, batch)

    with hiding(stock.model, attention):
        reference = two_turns(stock.model, batch, after, turns)
    for place, when in ((slice(0, NEW), "first turn"), (slice(NEW, None), "second turn")):
        if ours[:, place].shape[1]:
            trial.compare(f"{name}, {when}", ours[:, place], reference[:, place])


def _shown(config: MethodConfig, kept: list[Kept], call: int, batch: Prompt) -> Shown | None:
    """What the call of this number may see."""
    if call >= len(kept):
        return None
    if not isinstance(config, StepEviction):
        return PromptKept(kept[call - 1], batch.width, batch.lengths)
    one_token = call != NEW  # the question of the second turn comes in one call
    before_attention = config.vacancies == 0 and one_token
    return StepKept(kept[call - 1], kept[call] if before_attention else None, batch.width, batch.lengths)


def judge_all(stock: Stock, methods: tuple[str, ...] = METHODS) -> dict[str, Verdict]:
    """Verdict by method."""
    return {method: judge(stock, method) for method in methods}
