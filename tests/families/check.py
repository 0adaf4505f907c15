"""One family, every method: right or refused, in each call that the stock model itself can do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

import llm_accel
from llm_accel import LlmAccelError, RetrievalHeads
from llm_accel.methods import MethodConfig, StepEviction
from llm_accel.report import Report
from tests.contracts.head_oracle import HeadOracle
from tests.families.calls import NEW, Prompt, difference, two_turns
from tests.families.methods import BELOW, METHODS, WHOLE, sparse_at_any_length, split_heads
from tests.families.oracle import HidingAttention, Kept, PromptKept, Shown, SplitHeads, StepKept, hiding, kept_now
from tests.families.stock import CHUNK, CHUNKS, SECOND, Stock, first_line
from tests.families.verdict import FAILS, NOT_JUDGED, REFUSED, RIGHT, WRONG, Verdict
from tests.patches.calls import Outside


class Difference(Exception):
    """Ours is not what it should be."""


class NotAsked(Exception):
    """The family's own generate does not do what the tests ask of it."""


class Failure(Exception):
    """A call ended in an error that is none of ours."""


@dataclass
class Trial:
    """The calls of one method on one family.

    Attributes:
        stock: the family.
        error: the largest difference so far.
        refusals: message of our own -> calls that it refused.
        done: calls that went through.
        ours: shape -> logits of a budget below the prompt, and what was kept of the prompt.
    """

    stock: Stock
    error: float = 0.0
    refusals: dict[str, list[str]] = field(default_factory=dict)
    done: int = 0
    ours: dict[str, tuple[Tensor, Kept]] = field(default_factory=dict)

    def compare(self, call: str, ours: Tensor, reference: Tensor) -> None:
        """Raises :class:`Difference` above the bar."""
        found = difference(ours, reference)
        self.error = max(self.error, found)
        if not found <= self.stock.bar:
            raise Difference(f"{call}: logits off by {found:.1e} of the largest (allowed: {self.stock.bar:.0e})")

    def call(self, name: str, run: Callable[..., None], *args: Any, **more: Any) -> None:
        """One kind of call; one that an error of ours refuses is noted."""
        try:
            run(self, name, *args, **more)
            self.done += 1
        except LlmAccelError as error:
            self.refusals.setdefault(f"{type(error).__name__}: {first_line(error)}", []).append(name)
        except (Difference, NotAsked):
            raise
        except Exception as error:
            raise Failure(f"{name}: {type(error).__name__}: {first_line(error)}") from error

    @property
    def notes(self) -> list[str]:
        return [f"{'; '.join(calls)}: {why}" for why, calls in self.refusals.items()]


def judge_all(stock: Stock, methods: tuple[str, ...] = METHODS) -> dict[str, Verdict]:
    """Verdict by method."""
    return {method: judge(stock, method) for method in methods}


def judge(stock: Stock, method: str) -> Verdict:
    """Every call of one method."""
    verdict = judged(stock, lambda trial: _judge_calls(trial, method))
    verdict.why = verdict.why.replace(WHOLE[method]().spec(), method)
    return verdict


def judged(stock: Stock, calls: Callable[[Trial], Verdict]) -> Verdict:
    """What ``calls`` say or raise; afterwards the model must be as before."""
    outside = Outside.of(stock.model)
    trial = Trial(stock)
    try:
        verdict = calls(trial)
    except LlmAccelError as error:
        verdict = Verdict(REFUSED, str(error))
    except Difference as error:
        verdict = Verdict(WRONG, str(error))
    except NotAsked as error:
        verdict = Verdict(NOT_JUDGED, str(error))
    except Failure as error:
        verdict = Verdict(FAILS, str(error))
    except Exception as error:
        verdict = Verdict(FAILS, f"apply: {type(error).__name__}: {first_line(error)}")
    verdict.error = trial.error if trial.done else None
    verdict.notes = trial.notes
    return _untouched(stock, outside, verdict)


def _untouched(stock: Stock, outside: Outside, verdict: Verdict) -> Verdict:
    """The verdict, if nothing of the plug-in is left: no hook, no changed configuration, the same bits."""
    left = Outside.of(stock.model) != outside
    if not left and torch.equal(two_turns(stock.model, stock.single, turns=1), stock.answers["single"]):
        return verdict
    llm_accel.remove(stock.model)
    what = "the model is not as before" if left else "logits are not bit-identical"
    return Verdict(WRONG, f"after {'a refusal' if verdict.status == REFUSED else 'remove'}: {what}; {verdict.why}")


def _judge_calls(trial: Trial, method: str) -> Verdict:
    stock = trial.stock
    with llm_accel.apply(stock.model, WHOLE[method]()):  # refused here, the method is refused, not a call
        pass
    for shape, turns in stock.shapes():
        trial.call(f"{shape}, nothing to cut", _whole, method, shape, turns)
    if method in BELOW:
        _judge_below(trial, BELOW[method])
    if method == "retrieval_heads" and stock.oracle:
        for shape, turns in stock.shapes():
            trial.call(f"{shape}, prompt dense", _split, shape, 1, "dense")
            trial.call(f"{shape}, prompt streamed", _split, shape, turns, "lambda")
    if not trial.done:
        return Verdict(FAILS, f"accepted by apply, then every call is refused: {next(iter(trial.refusals))}")
    if method in BELOW and not stock.oracle:
        return Verdict(NOT_JUDGED, "attention of this family is more than a mask, so that none can stand for eviction")
    return Verdict(RIGHT)


def _judge_below(trial: Trial, make: Callable[[], MethodConfig]) -> None:
    stock = trial.stock
    for shape, turns in stock.shapes():
        trial.call(shape, _against_oracle, make(), shape, turns)
        if f"{shape}, {CHUNKS}" in stock.answers and shape in trial.ours:
            trial.call(f"{shape}, {CHUNKS}", _chunks, make(), shape)
    if stock.independent and "padded" in trial.ours:
        trial.call("padded rows against each alone", _rows_alone, make())


def _whole(trial: Trial, name: str, method: str, shape: str, turns: int) -> None:
    """A budget that covers everything: logits of the dense model."""
    stock = trial.stock
    with sparse_at_any_length(), llm_accel.apply(stock.model, WHOLE[method]()):
        ours = two_turns(stock.model, stock.prompt_of(shape), turns=turns)
    trial.compare(name, ours, stock.answers[f"{shape}, {SECOND}" if turns == 2 else shape])


def _rows_alone(trial: Trial, name: str, config: MethodConfig) -> None:
    """Rows of the padded batch against the rows alone, the first of which is the single row."""
    together = trial.ours["padded"][0]
    if "single" in trial.ours:
        trial.compare(f"{name}, row 0", together[:1, :NEW], trial.ours["single"][0][:, :NEW])
    with llm_accel.apply(trial.stock.model, config):
        alone = two_turns(trial.stock.model, trial.stock.batch.row(1), turns=1)
    trial.compare(f"{name}, row 1", together[1:2, :NEW], alone)


def _chunks(trial: Trial, name: str, config: MethodConfig, shape: str) -> None:
    """The prompt in chunks against the prompt in one call: the same entries are kept, the logits are the same."""
    stock = trial.stock
    kept: list[Kept] = []
    with llm_accel.apply(stock.model, config, trace=True) as handle:
        ours = two_turns(
            stock.model,
            stock.prompt_of(shape),
            lambda step: kept.append(kept_now(handle.report())),
            turns=1,
            prefill_chunk_size=CHUNK,
        )
    whole, kept_whole = trial.ours[shape]
    trial.compare(name, ours, whole[:, :NEW])
    if any(not torch.equal(entries, kept_whole[layer]) for layer, entries in kept[0].items()):
        raise Difference(f"{name}: other entries are kept than of the prompt in one call")


def _against_oracle(trial: Trial, name: str, config: MethodConfig, shape: str, turns: int) -> None:
    """Logits against the stock model that hides what the reports say was evicted, call by call."""
    stock, batch = trial.stock, trial.stock.prompt_of(shape)
    kept: list[Kept] = []
    with llm_accel.apply(stock.model, config, trace=True) as handle:
        ours = two_turns(stock.model, batch, lambda step: kept.append(kept_now(handle.report())), turns)
        if not kept:
            raise NotAsked("its generate takes no logits processors, from which the tests see each step")
        _require_eviction(name, config, handle.report(), kept[0])
    trial.ours[shape] = (ours, kept[0])
    if stock.oracle:
        _compare_with(trial, name, ours, batch, turns, lambda call: _shown(config, kept, call, batch))


def _split(trial: Trial, name: str, shape: str, turns: int, prefill: Literal["dense", "lambda"]) -> None:
    """Every second head streams: logits against the stock model whose heads hide by the rule of the method."""
    stock, batch = trial.stock, trial.stock.prompt_of(shape)
    config: RetrievalHeads = split_heads(stock.kv_heads, prefill)
    with llm_accel.apply(stock.model, config) as handle:
        ours = two_turns(stock.model, batch, turns=turns)
        layers = tuple(layer.layer for layer in handle.report().layers if layer.skipped_reason is None)
    shown = SplitHeads(HeadOracle(config, batch.lengths, layers))
    _compare_with(trial, name, ours, batch, turns, lambda call: shown)


def _require_eviction(name: str, config: MethodConfig, report: Report, kept: Kept) -> None:
    if not kept or not any(layer.evicted for layer in report.layers):
        raise Difference(f"{name}: nothing was evicted under {config.spec()}")


def _compare_with(
    trial: Trial, name: str, ours: Tensor, batch: Prompt, turns: int, shown: Callable[[int], Shown | None]
) -> None:
    """Against the oracle, for which ``shown`` says what the call of each number sees."""
    attention = HidingAttention()
    attention.shown = shown(0)

    def after(step: int) -> None:
        attention.shown = shown(step + 1)

    with hiding(trial.stock.model, attention):
        reference = two_turns(trial.stock.model, batch, after, turns)
    trial.compare(f"{name}, first turn", ours[:, :NEW], reference[:, :NEW])
    if turns == 2:
        trial.compare(f"{name}, {SECOND}", ours[:, NEW:], reference[:, NEW:])


def _shown(config: MethodConfig, kept: list[Kept], call: int, batch: Prompt) -> Shown | None:
    """What the call of this number sees of what was kept."""
    if call not in range(1, len(kept)):  # the prompt sees everything
        return None
    if not isinstance(config, StepEviction):
        return PromptKept(kept[call - 1], batch.width, batch.lengths)
    one_token = call != NEW  # the question of the second turn comes in one call
    before_attention = config.empty_slots == 0 and one_token
    return StepKept(kept[call - 1], kept[call] if before_attention else None, batch.width, batch.lengths)
