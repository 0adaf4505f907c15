"""Controls that are compared with methods: what the language model knows without the image, and what an ideal choice of
patches reaches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llm_accel.errors import ConfigError
from llm_accel.methods import MethodConfig, MethodInfo, VisualTokens
from llm_accel.methods.base import option


@dataclass(frozen=True)
class InputControl(MethodConfig):
    """Runs the model without a plug-in on another input."""

    info: ClassVar[MethodInfo] = MethodInfo("control, no paper", "the image", False, False, ("vision",))


@dataclass(frozen=True)
class Blind(InputControl):
    """The prompt without its image: what can be guessed."""

    name: ClassVar[str] = "blind"


@dataclass(frozen=True)
class Blank(InputControl):
    """A grey image of the same size: what is answered without content."""

    name: ClassVar[str] = "blank"


@dataclass(frozen=True)
class OracleTokens(VisualTokens):
    """Keeps the patches that objects cover, as many as fit, and background for the rest: an upper bound for methods
    that see the image only. Needs data that says where objects are."""

    order: tuple[int, ...] = option("filled in for each image: its visual tokens, those to keep first", ())

    name: ClassVar[str] = "oracle"
    info: ClassVar[MethodInfo] = MethodInfo(
        "control, no paper", "visual tokens before the language model", False, True, ("vision",)
    )

    def choose(self, count: int, scores: Tensor | None, device: torch.device) -> Tensor:
        if len(self.order) != count:
            raise ConfigError(
                f"oracle: the image has {count} visual tokens, but the data locates objects on {len(self.order)} "
                "patches; leave it out for this model."
            )
        return torch.tensor(sorted(self.order[: self.tokens(count)]), dtype=torch.int64, device=device)


CONTROLS: Mapping[str, type[MethodConfig]] = {"blind": Blind, "blank": Blank, "oracle": OracleTokens}


def with_patch_order(
    configs: Sequence[MethodConfig], patches: npt.NDArray[np.bool_] | None, seed: int
) -> tuple[MethodConfig, ...]:
    """The methods, the oracle with the patches of one image: the covered ones in random order, then the others. Raises
    :class:`ConfigError`: an oracle on an image without known object positions."""
    if not any(isinstance(config, OracleTokens) for config in configs):
        return tuple(configs)
    if patches is None:
        raise ConfigError("oracle: this data does not say where objects are; leave it out.")
    shuffled = np.random.default_rng(seed).permutation(patches.size)
    order = tuple(shuffled[np.argsort(~patches.ravel()[shuffled], kind="stable")].tolist())
    return tuple(replace(config, order=order) if isinstance(config, OracleTokens) else config for config in configs)
