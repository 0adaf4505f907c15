"""Retrieval heads keep the whole KV cache, all others a stream; or they are masked, to show what rests on them
(Retrieval Head, arXiv 2404.15574; RazorAttention, 2407.15891; DuoAttention, 2410.10819)."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from llm_accel.errors import ConfigError
from llm_accel.methods.base import ENTRIES, LAYERS, MethodConfig, MethodInfo, option
from llm_accel.methods.claims import Claim
from llm_accel.methods.kv.head_profile import Head, HeadProfile
from llm_accel.methods.kv.head_roles import HeadMask, HeadSplit, ModelHeads, per_layer
from llm_accel.methods.kv.snapkv import SnapKV
from llm_accel.methods.kv.streaming_llm import StreamingLLM

_HEAD = re.compile(r"(\d+)\.(\d+)")


@dataclass(frozen=True)
class RetrievalHeads(MethodConfig):
    """Per layer and KV head either everything is kept or sinks and a window. As a test of cause and effect, mode "mask"
    takes query heads out instead and frees nothing."""

    heads: str | None = option(
        "heads.json of `llm-accel heads` or a DuoAttention pattern; None: the bundled model's own profile", None
    )
    skip_layers: tuple[int, ...] = option("layers that stay dense, for example 0+1", (), most=LAYERS)
    mode: Literal["stream", "mask"] = option(
        "stream: non-retrieval heads keep sinks and window; mask: ablation", "stream"
    )
    head_list: tuple[str, ...] = option("heads to use instead of scores, as layer.head, for example 3.0+3.2", ())
    sinks: int = option("first real tokens that a streaming head keeps", 64, most=ENTRIES, least=0)
    recent: int = option(
        "newest entries that a streaming head keeps, the current token included", 256, most=ENTRIES, least=1
    )
    full: float | None = option("stream: share of all KV heads that keep everything, by score", None, share="[0, 1]")
    full_budget: int | None = option("stream: SnapKV budget of the heads that keep everything", None, most=ENTRIES)
    prefill: Literal["dense", "chunk", "lambda"] = option(
        "stream: dense: all heads see the prompt; chunk: evict after each chunk; lambda: sinks and window everywhere",
        "dense",
    )
    k: int | None = option(
        "mask: number of query heads to mask, highest scores first; None: all detected ones",
        None,
        most=LAYERS * LAYERS,
        least=0,
    )
    mask_mode: Literal["zero", "uniform", "window"] = option(
        "mask: zero: no output; uniform: equal weights; window: sinks and window only", "zero"
    )
    phase: Literal["decode", "all"] = option(
        "mask: decode: from the last prompt token on; all: at every position", "decode"
    )
    control: Literal["random", "random_excluding_circuit"] | None = option(
        "mask: mask as many other heads instead: any, or any outside the circuit", None
    )
    seed: int = option("seed of the control", 0)

    name: ClassVar[str] = "retrieval_heads"
    info: ClassVar[MethodInfo] = MethodInfo(
        "DuoAttention, arXiv 2410.10819", "KV cache of the heads that do not retrieve"
    )

    def validate(self) -> None:
        if len(set(self.skip_layers)) != len(self.skip_layers) or any(index < 0 for index in self.skip_layers):
            self.fail("skip_layers", "distinct layer indices counted from 0")
        if not all(_HEAD.fullmatch(item) for item in self.head_list):
            self.fail("head_list", "heads as layer.head, joined by +, for example 3.0+3.2")
        self._refuse_options_of_the_other_mode()
        if self.head_list and (self.heads or self.full is not None or self.k is not None or self.control):
            raise ConfigError(f"{self.name}: head_list names the heads; leave heads, full, k and control out.")
        if self.full_budget is not None:
            SnapKV(budget=self.full_budget)

    def _refuse_options_of_the_other_mode(self) -> None:
        stream, mask = ("full", "full_budget", "prefill"), ("k", "mask_mode", "phase", "control", "seed")
        wrong = [key for key in self.changed() if key in (mask if self.mode == "stream" else stream)]
        if wrong:
            other = "mask" if self.mode == "stream" else "stream"
            raise ConfigError(f"{self.name}: {', '.join(wrong)} belong to mode={other}, not to mode={self.mode}.")

    @property
    def claims(self) -> Mapping[Claim, str]:
        alone = "cannot be combined with {other}; for SnapKV on the heads that keep everything give full_budget."
        return dict.fromkeys(Claim, alone)

    @property
    def needs_profile(self) -> bool:
        """Whether scores decide about heads."""
        if self.head_list:
            return False
        return self.full not in (0.0, 1.0) if self.mode == "stream" else self.k != 0

    def split(self, model: ModelHeads, profile: HeadProfile | None) -> HeadSplit | None:
        """How the KV heads are split, or None."""
        if self.mode != "stream":
            return None
        if self.head_list:
            full = self._listed(model.layers, model.kv_heads, "KV")
        elif profile is None:
            full = [(at, head) for at in model.eligible for head in range(model.kv_heads) if self.full == 1.0]
        else:
            share = profile.full_share(model.eligible) if self.full is None else self.full
            full = profile.full_heads(share, model.eligible)
        return HeadSplit(
            full=per_layer(full, model.layers),
            streaming=StreamingLLM(budget=self.sinks + self.recent, sinks=self.sinks),
            full_compression=None if self.full_budget is None else SnapKV(budget=self.full_budget),
            sinks=self.sinks,
            recent=self.recent,
            prefill=self.prefill,
        )

    def mask(self, model: ModelHeads, profile: HeadProfile | None) -> HeadMask | None:
        """Which query heads are masked, or None."""
        if self.mode != "mask":
            return None
        if self.head_list:
            masked = self._listed(model.layers, model.query_heads, "query")
        else:
            masked = [] if profile is None else self._by_score(model, profile)
        skipped = set(self.skip_layers)
        chosen = per_layer([(layer, head) for layer, head in masked if layer not in skipped], model.layers)
        return HeadMask(chosen, self.mask_mode, self.phase, self.sinks, self.recent)

    def _by_score(self, model: ModelHeads, profile: HeadProfile) -> list[Head]:
        detected = profile.detected()
        everything = profile.query_heads()
        count = len(detected) if self.k is None else self.k
        if count > len(everything):
            self.fail("k", f"at most {len(everything)}, the query heads of this model")
        if self.control is None:
            return everything[:count]
        pool = set(everything[count:])  # a control that draws the heads under test would show their effect
        if self.control == "random_excluding_circuit":
            if profile.circuit is None:
                raise ConfigError(
                    f"{self.name}: control=random_excluding_circuit needs a profile that knows the circuit; make one "
                    "with: llm-accel heads --detector copy_paste --circuit"
                )
            pool -= {*profile.circuit, *detected}
        if count > len(pool):
            raise ConfigError(
                f"{self.name}: control={self.control} draws {count} of {len(pool)} heads; give a smaller k."
            )
        return random.Random(f"heads/{self.seed}").sample(sorted(pool), count)

    def _listed(self, layers: int, heads: int, kind: str) -> list[Head]:
        found = [(int(layer), int(head)) for layer, head in (item.split(".") for item in self.head_list)]
        if any(layer >= layers or head >= heads for layer, head in found):
            self.fail("head_list", f"layers 0 to {layers - 1} and {kind} heads 0 to {heads - 1}")
        return found
