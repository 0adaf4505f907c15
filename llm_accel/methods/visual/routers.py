"""The routers of DyVTE (arXiv 2411.19628): per layer, a small network that reads text rows only and decides whether the
image has been taken in. Two matrices without biases: exit where logit 1 of ``W2 GELU(W1 f)`` is above logit 0."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llm_accel.errors import ConfigError
from llm_accel.methods.visual.base import CutModel, CutView
from llm_accel.methods.visual.exit_profile import MAKE

FORMAT = "llm_accel dyvte routers 1"


@dataclass(frozen=True)
class RouterInfo:
    """Which model routers belong to: its name, layers L, channels C of a row, fingerprints; how many samples trained
    them, and with which seed."""

    model: str
    layers: int
    hidden: int
    config_hash: str
    weights_hash: str
    samples: int = 0
    seed: int = 0


class Routers:
    """The routers of one model.

    Args:
        info: whose they are.
        weights: layer -> (W1 [r, 2 C], W2 [2, r]), of any floating type; computed in fp32.
    """

    def __init__(self, info: RouterInfo, weights: Mapping[int, tuple[Tensor, Tensor]]) -> None:
        self.info = info
        self.weights = dict(sorted(weights.items()))
        self._on: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    def __deepcopy__(self, memo: dict[int, object]) -> Routers:
        """Itself: the weights never change."""
        return self

    def logits(self, layer: int, features: Tensor) -> Tensor:
        """fp32 [B, 2], keep and exit, of features [B, 2 C] after one layer."""
        place = (layer, features.device)
        if place not in self._on:
            first, last = self.weights[layer]
            self._on[place] = first.to(features.device), last.to(features.device)
        first, last = self._on[place]
        return F.linear(F.gelu(F.linear(features.float(), first.float())), last.float())

    def exits(self, layer: int, features: Tensor) -> Tensor:
        """bool [B]: for which rows the router of a layer says exit; a tie keeps."""
        keep, leave = self.logits(layer, features).unbind(-1)
        return leave > keep

    def keep(self, view: CutView) -> Tensor:
        """Which rows go on after a layer: all, or none that is visual if every row of the batch that has an image says
        exit, each after at least two text tokens after its last image."""
        assert view.hidden is not None
        features, ready = text_features(view.hidden, view.visual, view.real)
        votes = (self.exits(view.layer, features) & ready).to(view.visual.device)
        leave = bool((votes | ~view.visual.any(-1)).all())
        return view.real & ~view.visual if leave else view.real

    def check(self, model: CutModel) -> None:
        """Raises :class:`ConfigError` unless these are routers of this very model."""
        info = self.info
        if (info.layers, info.hidden) != (model.layers, model.hidden):
            raise ConfigError(
                f"these routers are for {info.layers} layers of {info.hidden} channels ({info.model!r}); {model.name} "
                f"has {model.layers} of {model.hidden}. Train some for it with: {MAKE}"
            )
        hashed = "offloaded" not in (info.weights_hash, model.weights_hash)
        if hashed and info.weights_hash != model.weights_hash:
            raise ConfigError(
                f"these routers were trained on {info.model!r}, which has other weights than this {model.name}; train "
                f"some for it with: {MAKE}"
            )
        if not hashed and info.config_hash != model.config_hash:
            raise ConfigError(
                f"these routers were trained on {info.model!r}, which has another configuration than this "
                f"{model.name}; train some for it with: {MAKE}"
            )

    def save(self, path: Path) -> None:
        """Writes them as safetensors; a file that exists is replaced only when the new one is complete."""
        tensors = {}
        for layer, (first, last) in self.weights.items():
            tensors[f"{layer}.w1"], tensors[f"{layer}.w2"] = first.cpu().contiguous(), last.cpu().contiguous()
        partial = path.with_name(path.name + ".partial")
        save_file(tensors, partial, {"llm_accel": json.dumps({"format": FORMAT} | asdict(self.info))})
        partial.replace(path)


def load_routers(path: str | Path) -> Routers:
    """Reads ``routers.safetensors``, or the one in a folder.

    Raises:
        ConfigError: no such file, something else, or matrices that do not fit together.
    """
    file = Path(path).expanduser()
    file = file / "routers.safetensors" if file.is_dir() else file
    try:
        with safe_open(file, "pt") as opened:
            about: dict[str, Any] = json.loads((opened.metadata() or {})["llm_accel"])
            if about.pop("format", None) != FORMAT:
                raise ValueError(f"its format is not {FORMAT!r}")
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118, no mapping
        info = RouterInfo(**about)
        layers = sorted({int(name.split(".")[0]) for name in tensors})
        weights = {layer: (tensors[f"{layer}.w1"], tensors[f"{layer}.w2"]) for layer in layers}
    except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"routers={str(path)!r} cannot be read as routers ({error}); train some with: {MAKE}"
        ) from error
    for layer, (first, last) in weights.items():
        if first.ndim != 2 or first.shape[1] != 2 * info.hidden or last.shape != (2, first.shape[0]):
            raise ConfigError(
                f"routers={str(path)!r}: those of layer {layer} have shapes {list(first.shape)} and "
                f"{list(last.shape)}; [r, {2 * info.hidden}] and [2, r] belong to {info.hidden} channels."
            )
        if not 0 <= layer < info.layers - 1:
            raise ConfigError(f"routers={str(path)!r} has one for layer {layer}; allowed are 0 to {info.layers - 2}.")
    return Routers(info, weights)


def text_features(hidden: Tensor, visual: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """What a router reads: the mean of the text rows after a prompt's last visual token and before its last row, and
    that last row.

    Args:
        hidden: [B, n, C], padded on the left.
        visual, real: bool [B, n], which rows are visual tokens, and which are no padding.

    Returns:
        fp32 [B, 2 C], and bool [B]: whether a row has both parts, which takes two text tokens after its last image.
    """
    visual, real = visual.to(hidden.device), real.to(hidden.device)
    places = torch.arange(hidden.shape[1], device=hidden.device)
    behind = places > torch.where(visual, places, -1).amax(-1, keepdim=True)
    between = real & behind & (places < hidden.shape[1] - 1)
    count = between.sum(-1)
    total = hidden.float().masked_fill(~between[..., None], 0.0).sum(1)
    mean = total / count.clamp(min=1)[:, None]
    return torch.cat([mean, hidden[:, -1].float()], dim=-1), (count > 0) & behind[:, -1] & real[:, -1]
