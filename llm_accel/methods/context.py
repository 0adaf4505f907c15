"""The role of methods that compress a context once all layers hold it, by letting the model read it again."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from llm_accel.methods.claims import Claim
from llm_accel.methods.prompt_view import PromptView
from llm_accel.methods.roles import ScoreAndKeep


@dataclass(frozen=True)
class PassView:
    """What a method sees of one layer while the model reads a part of the context again. Rows have no padding.

    Attributes:
        query: all queries of the pass, post-RoPE, [B, Hq, q, D].
        key: the keys that they may attend to, post-RoPE, [B, H, n + q, D]: those of the n entries of the context,
            oldest first, and behind them those of the pass itself.
        kv_heads: heads that the cache stores, each shared by ``Hq / kv_heads`` query heads.
        first, last: the part that is read again holds the entries ``first`` to ``last - 1``.
        scaling: softmax scale.
        softcap: logit soft cap, or None.
        learned_sinks: learned sink logits per query head [Hq], or None.
        lse: what attention has found on its way, or None: log-sum-exp of the logits of each query over the first
            :attr:`ContextCompression.pass_sinks` entries, the part and the keys of the pass, fp32 [B, Hq, q].
    """

    query: Tensor
    key: Tensor
    kv_heads: int
    first: int
    last: int
    scaling: float
    softcap: float | None = None
    learned_sinks: Tensor | None = None
    lse: Tensor | None = None


@dataclass(frozen=True)
class Lead:
    """Token ids that the model is told before the tokens of a part.

    Attributes:
        first: before the first part.
        later: before each later one, followed by the ``repeated`` tokens of the context that precede it.
        behind: right before the part, the first one included.
        repeated: see ``later``.
        head: what a chat template puts before the text of a user. A context that begins with it is read again without
            it, and its entries score 0.
    """

    first: tuple[int, ...] = ()
    later: tuple[int, ...] = ()
    behind: tuple[int, ...] = ()
    repeated: int = 8
    head: tuple[int, ...] = ()


@dataclass(frozen=True)
class ContextCompression(ScoreAndKeep):
    """Role: compresses the first prompt of a cache, the context. When all layers hold it, the model reads it again,
    part by part, on top of its entries, and :meth:`pass_score` sees the attention. Then all layers evict together. What
    comes later on the same cache is appended whole."""

    @property
    def claims(self) -> Mapping[Claim, str]:
        alone = (
            "lets the model read the context a second time, on entries and with attention that {other} would change; "
            "give one of them alone."
        )
        return dict.fromkeys(Claim, alone)

    @abstractmethod
    def parts(self, first: int, length: int) -> list[tuple[int, int]]:
        """The parts that the tokens ``first`` to ``length - 1`` of a context are read again in: first token and the one
        past the last."""

    @property
    def layers_compete(self) -> bool:
        return True

    @property
    def pass_sinks(self) -> int:
        """How many of the first entries of the context take part in the softmax of every pass."""
        return 0

    @property
    def tokenizer_use(self) -> Literal["required", "optional", "none"]:
        """Whether :meth:`lead` takes the model's tokenizer."""
        return "none"

    @abstractmethod
    def lead(self, tokenizer: Any = None) -> Lead:
        """What the model is told before each part; None where there is no tokenizer."""

    @abstractmethod
    def pass_score(self, view: PassView) -> Tensor:
        """What one pass says of the entries of its part, fp32 [B, kv_heads, last - first], at least 0. Where queries of
        several layers read the same entries, the highest score counts."""

    def score(self, view: PromptView) -> Tensor:
        assert view.scores is not None
        return view.scores
