"""Which methods can be applied together follows from what each of them claims to decide alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations, permutations
from typing import ClassVar

import pytest

from llm_accel import ConfigError, Dense, list_methods
from llm_accel.methods import Claim, MethodConfig, MethodInfo
from llm_accel.patches.plan import check_composition
from llm_accel.registry import parse_all

KV = ("snapkv", "pyramidkv", "random", "auto")  # append, as many entries in each head, or may choose to
MOVING = ("adakv", "h2o", "streaming_llm", "h2o:semantics=sim")
TOKENS = (
    *("flowcut", "visionzip", "divprune", "cdpruner", "prunesid", "evs", "vidcom2"),
    *("downsample", "stride_tokens", "random_tokens"),
)
CUTS = ("fastv", "dart", "dyvte")
SHIFTING = ("paint", "var")
CONTRAST = "vasparse:beta=0,keep=1"
ALONE = ("retrieval_heads", "dense:capacity=64", "kvzip")


def fits(one: str, other: str) -> bool:
    """Two different methods, in whichever order."""
    for first, second in ((one, other), (other, one)):
        if first in KV:
            if second in ("hip", *TOKENS, *CUTS, CONTRAST, *SHIFTING, "vhr"):
                return True
        elif first in MOVING or first == "hip":
            if second in (*TOKENS, *CUTS, CONTRAST, "vhr"):
                return True
        elif first in ("vasparse", CONTRAST):
            if second in (*TOKENS, *CUTS, "vhr") or (first == CONTRAST and second in SHIFTING):
                return True
        elif first in ("vhr", *SHIFTING):
            if second in (*TOKENS, *CUTS) or (first == "vhr" and second in SHIFTING):
                return True
        elif first in TOKENS and second in CUTS:
            return True
    return False


def test_every_pair_of_methods() -> None:
    specs = (*KV, *MOVING, "hip", *TOKENS, *CUTS, "vasparse", CONTRAST, *SHIFTING, "vhr", *ALONE)
    assert {spec.partition(":")[0] for spec in specs} == set(list_methods())
    for one, other in combinations(specs, 2):
        pairs = list(permutations((*parse_all(one), *parse_all(other))))
        for pair in pairs:
            if fits(one, other):
                check_composition(pair)
                continue
            with pytest.raises(ConfigError) as caught:
                check_composition(pair)
            said = str(caught.value)
            assert one in said or other in said
            assert any(advice in said for advice in ("give", "combine it with"))


def test_three_methods_and_none() -> None:
    check_composition(parse_all("flowcut+dyvte+snapkv:budget=64"))
    check_composition(parse_all("snapkv:budget=64+hip+fastv"))
    with pytest.raises(ConfigError, match="flowcut:llm_stage=on and dyvte both let visual tokens leave after a layer"):
        check_composition(parse_all("flowcut:llm_stage=on+dyvte"))
    with pytest.raises(ConfigError, match="is the model as it is; give it alone, or leave it out"):
        check_composition((*parse_all("snapkv:budget=64"), Dense(capacity=64)))
    with pytest.raises(ConfigError, match=r"method=\[\] names no method"):
        check_composition([])


@dataclass(frozen=True)
class Logits(MethodConfig):
    """A method of no role that this package knows."""

    name: ClassVar[str] = "logits"
    info: ClassVar[MethodInfo] = MethodInfo("none", "nothing", needs_query=False, frees_memory=False)

    @property
    def claims(self) -> Mapping[Claim, str]:
        return {Claim.DECODING: "samples twice, which {other} cannot; give one of them."}


def test_a_method_of_another_package_says_what_it_claims() -> None:
    check_composition([Logits(), *parse_all("snapkv+hip+fastv")])
    with pytest.raises(ConfigError, match="logits samples twice, which vasparse cannot; give one of them"):
        check_composition([*parse_all("vasparse"), Logits()])
