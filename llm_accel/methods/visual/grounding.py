"""The roles of methods that make answers rest more on the image: they take nothing out, they change what attention
gives."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from llm_accel.errors import ConfigError
from llm_accel.methods.base import MethodConfig
from llm_accel.methods.claims import Claim


@dataclass(frozen=True)
class Grounding(MethodConfig):
    """What the roles here share."""

    @property
    def acts(self) -> bool:
        """Whether it changes anything; otherwise the model runs as it is, to the bit."""
        return True

    @abstractmethod
    def acting_layers(self, layers: int) -> tuple[int, ...]:
        """The layers of a model with ``layers`` layers in which the method acts, ascending.

        Raises:
            ConfigError: the model has no such layer.
        """

    def _check_layers(self, chosen: Sequence[int], layers: int) -> tuple[int, ...]:
        beyond = [index for index in chosen if index >= layers]
        if beyond:
            raise ConfigError(f"{self.spec()} names layer {beyond[0]}, but the model has layers 0 to {layers - 1}.")
        return tuple(sorted(set(chosen)))


@dataclass(frozen=True)
class HeadScaling(Grounding):
    """Role: scales the outputs of attention heads. How much is decided on the first prompt that shows an image, by what
    becomes of each head when the tokens of the image are taken out of it, and holds for all later tokens."""

    @property
    def claims(self) -> Mapping[Claim, str]:
        return {Claim.HEADS: ""}

    @property
    def scales_both(self) -> bool:
        """Whether the pass without the image is scaled too, so that later layers compare like with like."""
        return True

    @abstractmethod
    def factors(self, seen: Tensor, blind: Tensor) -> Tensor:
        """The factor of each head, fp32 [B, Hq].

        Args:
            seen: output of each head for the last token of the prompt, [B, Hq, Dv].
            blind: the same where the prompt has no image.
        """


@dataclass(frozen=True)
class Columns:
    """What some queries see of the marked entries of one layer.

    Attributes:
        logits: scaled and capped logits before softmax, fp32 [B, Hq, T, n]; -inf for entries that a query does not see.
        total: log-sum-exp of all logits of a row, marked or not, learned sinks included, fp32 [B, Hq, T].
        marks: what :meth:`WeightShift.marks` said of each entry, int8 [B, Hq, 1, n]; 0 where a head has fewer.
    """

    logits: Tensor
    total: Tensor
    marks: Tensor

    @property
    def weights(self) -> Tensor:
        """Attention that each query pays to the marked entries, fp32 [B, Hq, T, n]."""
        return (self.logits - self.total[..., None]).exp()


@dataclass(frozen=True)
class WeightShift(Grounding):
    """Role: shifts attention between entries that it marks when they arrive. The rest of a row is not looked at one by
    one, so attention itself may be computed by any backend."""

    @property
    def claims(self) -> Mapping[Claim, str]:
        return {
            Claim.WEIGHTS: "",
            Claim.ATTENTION: "corrects the attention that the model computes over all entries, which {other} "
            "computes in another way; give one of them.",
            Claim.ORDER: "knows entries by where they lie in the cache, which that of {other} does not keep; "
            "combine it with a method that compresses the prompt and keeps as many entries in each head: snapkv, "
            "pyramidkv, random.",
        }

    @property
    def last_query_only(self) -> bool:
        """Whether only the last query of a call is corrected, once the prompt is complete; otherwise every query that
        is no visual token."""
        return False

    @property
    def reads_tower(self) -> bool:
        """Whether :meth:`tower_marks` must be asked about each image."""
        return False

    @property
    def reads_states(self) -> bool:
        """Whether :meth:`marks` needs the hidden states that enter a layer."""
        return False

    def tower_marks(self, first: Tensor, last: Tensor, there: Tensor) -> Tensor:
        """Marks of the visual tokens of one image, int8 [n].

        Args:
            first, last: attention that each got from the class token, or from all patches where there is none, in the
                first layer of the vision tower and in the one whose output is used, fp32 [n].
            there: bool [n], which of them are patches that have not left the tower before its end.
        """
        raise NotImplementedError

    def told(self, states: Sequence[Tensor], layers: int) -> WeightShift:
        """The method with what it must know of a model, from the hidden states [1, 1, C] of a first token as they enter
        each layer. Asked where ``wants_states``."""
        return self

    @property
    def wants_states(self) -> bool:
        """Whether :meth:`told` is needed."""
        return False

    @abstractmethod
    def marks(self, visual: Tensor, given: Tensor | None, hidden: Tensor | None) -> Tensor:
        """Marks of new entries of one layer, int8 [B, n]; 0: not marked.

        Args:
            visual: which of them are visual tokens, bool [B, n].
            given: what :meth:`tower_marks` said of them, int8 [B, n], where ``reads_tower``.
            hidden: what enters the layer, [B, n, C], where ``reads_states``.
        """

    @abstractmethod
    def shift(self, view: Columns) -> tuple[Tensor, Tensor]:
        """What becomes of the output of each query: the factor on what attention gave, fp32 [B, Hq, T], and the
        weights, fp32 [B, Hq, T, n], with which the values of the marked entries are added."""

    @abstractmethod
    def counted(self, marks: Tensor) -> dict[str, list[int]]:
        """What stands in the report of a layer: name -> entries in each row, for the marks of its prompt [B, n]."""
