"""Whether vLLM with llm_accel answers token for token as transformers with llm_accel does, greedily in fp32.

    python -m benchmarks.vllm_equality --out benchmarks/results/vllm_equality_cpu.json       # where vLLM is installed
    python -m benchmarks.vllm_equality --part vision --part tiled                            # some parts

======= ===============================================================================================================
part    prompts
======= ===============================================================================================================
vision  128 questions about 12 scenes to the bundled vision model, dense and five settings
mrope   tiny random Qwen2-VL, Qwen2.5-VL, Qwen3-VL: 24 prompts of two images, chunks of 12, prefix caching
tiled   the same for LLaVA-NeXT, LLaVA-OneVision and InternVL
smollm  SmolLM2-135M (`make real`), or else the bundled model: four lengths, 60 tokens, other schedules, preemption
======= ===============================================================================================================

Each case is an engine of its own, and stands in ``--out`` as soon as it is done: the same command does what an
interrupted run lacks. Cases of other sources or versions are done again, so that all cases of a file belong together;
``complete`` says that none is missing. Exit status 1 where any token differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import conditions
from llm_accel.common.bundled import needle_model_path, vision_model_path
from llm_accel.common.checkpoints import checkpoint_path, is_fetched
from tests.integrations.vllm import kit, tiny_vision
from tests.integrations.vllm import visual_kit as visual

VISION = (
    None,
    "stride_tokens:budget=33",
    "random_tokens:budget=33",
    "flowcut:budget=33",
    "flowcut:budget=11",
    "visionzip:budget=33",
)
MROPE = {
    "qwen2_vl": ("flowcut:tower_stage=behind,llm_stage=off",),
    "qwen2_5_vl": ("random_tokens", "flowcut:tower_stage=behind,llm_stage=off", "visionzip:dominant=5,contextual=2"),
    "qwen3_vl": ("stride_tokens", "flowcut:tower_stage=behind,llm_stage=off", "visionzip:dominant=5,contextual=2"),
}
TILED = {
    "llava_next": ("stride_tokens:budget=9", "random_tokens:ratio=0.4,newline=keep"),
    "llava_onevision": (
        "random_tokens:budget=9", "flowcut:budget=20,newline=keep", "visionzip:dominant=5,contextual=2",
    ),
    "internvl": (
        "stride_tokens:budget=7", "flowcut:budget=5,tower_stage=behind", "visionzip:dominant=4,contextual=2",
    ),
}  # fmt: skip
KV = (
    "snapkv:budget=200,window=32", "streaming_llm:budget=192", "random:budget=200",
    "snapkv:budget=200,window=32,recompress_every=32",
)  # fmt: skip
LENGTHS, NEW, CHUNK = (700, 800, 100, 704), 60, 12
SCHEDULES: dict[str, dict[str, Any]] = {
    "one step": {"async_scheduling": False},
    "chunks of 96": {"max_num_batched_tokens": 96},
    "asynchronous": {"async_scheduling": True},
    "own processes": {"processes": True},
}
SOURCES = (
    *(f"llm_accel/{folder}/**/*.py" for folder in ("integrations/vllm", "methods", "patches", "cache", "kernels")),
    "tests/integrations/vllm/*kit.py", "tests/integrations/vllm/tiny_vision.py", "benchmarks/vllm_equality.py",
)  # fmt: skip
Tokens = Sequence[Sequence[int]]
Case = dict[str, Any]
Ask = Callable[[], tuple[Tokens, Tokens, Case]]
"""What vLLM answers, what transformers answers, and what else is known of a case."""


def counted(found: Tokens, wanted: Tokens) -> Case:
    """How many prompts and tokens are equal."""
    pairs = list(zip(found, wanted, strict=True))
    tokens = [(sum(a == b for a, b in zip(one, other, strict=False)), len(other)) for one, other in pairs]
    return {
        "prompts": len(pairs),
        "prompts_equal": sum(list(one) == list(other) for one, other in pairs),
        "tokens": sum(count for _, count in tokens),
        "tokens_equal": sum(equal for equal, _ in tokens),
    }


def vision(scenes: int = 12) -> Iterator[tuple[Case, Ask]]:
    """The bundled vision model."""

    def ask(method: str | None) -> tuple[Tokens, Tokens, Case]:
        with kit.engine(vision_model_path(), method, max_model_len=512) as llm:
            found, placeholders = visual.scenes_in_vllm(llm, scenes)
        return found, visual.scenes_in_transformers(method, scenes), {"placeholders": placeholders[0]}

    for method in VISION:
        yield {"model": "bundled vision model", "method": method or "dense"}, partial(ask, method)


def tiny(families: dict[str, tuple[str, ...]], count: int = 24, **options: Any) -> Iterator[tuple[Case, Ask]]:
    """Tiny models with random weights; each engine is asked twice, the second time by prefix caching."""

    def ask(family: str, method: str) -> tuple[Tokens, Tokens, Case]:
        prompts = tiny_vision.prompts(family, 2 * count, count)[2 * count :]  # the pairs
        limited = {"max_num_batched_tokens": CHUNK, "enable_prefix_caching": True} | visual.limits(method)
        with tempfile.TemporaryDirectory() as name:
            folder = tiny_vision.save(family, Path(name))
            with kit.engine(folder, method, **limited) as llm:
                found, placeholders = visual.in_vllm(llm, prompts)
                again, _ = visual.in_vllm(llm, prompts)
            wanted = visual.in_transformers(folder, prompts, method, **options)
        more = {
            "images": sum(len(images) for _, images in prompts),
            "placeholders": round(sum(placeholders) / len(placeholders), 1),
        }
        return [*found, *again], wanted * 2, more

    for family, methods in families.items():
        for method in methods:
            yield {"model": f"tiny {family}", "method": method, "chunk": CHUNK}, partial(ask, family, method)


def smollm(lengths: Sequence[int] = LENGTHS, new: int = NEW) -> Iterator[tuple[Case, Ask]]:
    """A pretrained text model where one was fetched."""
    folder = checkpoint_path("smollm2-135m")
    folder = folder if is_fetched(folder) else needle_model_path()
    tokens = kit.prompts(lengths)
    expected = cache(lambda method: kit.expected(tokens, method, new, folder))

    def ask(method: str | None, options: dict[str, Any]) -> tuple[Tokens, Tokens, Case]:
        with kit.engine(folder, method, **options) as llm:
            found = kit.answers(llm, tokens, new)
            freed = None if options.get("processes") or method is None else kit.manager(llm).freed
        return found, expected(method), {"blocks_freed": freed}

    for method in (None, *KV):
        about = {"model": folder.name, "method": method or "dense"}
        for name, options in SCHEDULES.items() if method is not None else [("one step", {})]:
            yield about | {"schedule": name}, partial(ask, method, options)
        if method is not None:
            yield about | {"schedule": "after preemption"}, partial(_after_preemption, folder, method, new)


def _after_preemption(folder: Path, method: str, new: int) -> tuple[Tokens, Tokens, Case]:
    """Requests that lose their place on the way begin anew with prompt and reply, in transformers as well."""
    tokens = kit.prompts([400 + 8 * one for one in range(8)])
    options: dict[str, Any] = {"num_gpu_blocks_override": 40, "max_model_len": 512 + new, "async_scheduling": False}
    options |= {"enable_prefix_caching": False}  # it would give a stream its old entries back
    with kit.engine(folder, method, **options) as llm, kit.preempted(llm) as lengths:
        found = kit.answers(llm, tokens, new)
        freed = kit.manager(llm).freed
    restarts = [lengths.get(tuple(prompt), []) for prompt in tokens]
    wanted = kit.expected(tokens, method, new, folder, restarts)
    return found, wanted, {"blocks_freed": freed, "preemptions": sum(map(len, restarts))}


PARTS: dict[str, Callable[[], Iterator[tuple[Case, Ask]]]] = {
    "vision": vision,
    "mrope": lambda: tiny(MROPE),
    "tiled": lambda: tiny(TILED, positions="compact"),
    "smollm": smollm,
}


def main() -> None:
    """Runs what is missing of the parts, and prints all that is known as one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=tuple(PARTS), help="default: all")
    parser.add_argument("--out", type=Path, help="a JSON file, which an interrupted run goes on with")
    args = parser.parse_args()
    import vllm

    torch.set_num_threads(1)  # as the engines; sums in another order could differ
    about = conditions(model="see each case", vllm=vllm.__version__, source=source())
    planned = {part: list(PARTS[part]()) for part in PARTS}
    done = known(args.out, about)
    for part in args.part or PARTS:
        for case, ask in planned[part]:
            if not any(case.items() <= one.items() for one in done[part]):
                found, wanted, more = ask()
                done[part].append(case | more | counted(found, wanted))
                print(json.dumps(done[part][-1]), file=sys.stderr, flush=True)
                write(args.out, result(about, done, planned))
    final = result(about, done, planned)
    print(json.dumps(final, indent=2))
    sys.exit(0 if final["all_equal"] else 1)


def source() -> str:
    """A hash of everything here that answers depend on."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(path for pattern in SOURCES for path in root.glob(pattern)):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def known(out: Path | None, about: dict[str, Any]) -> dict[str, list[Case]]:
    """The cases that a run before left, by part; none where its sources or versions were others."""
    found: dict[str, list[Case]] = {part: [] for part in PARTS}
    if out is None or not out.exists():
        return found
    before = json.loads(out.read_text())
    if not same(before["conditions"], about):
        print(f"{out}: other sources or versions; all cases are done again", file=sys.stderr, flush=True)
        return found
    return found | before["cases"]


def same(before: dict[str, Any], about: dict[str, Any]) -> bool:
    """Whether two runs had the same sources and versions; a commit in between may have changed neither."""

    def told(one: dict[str, Any]) -> tuple[Any, ...]:
        versions = {name: version for name, version in one["versions"].items() if name != "git_commit"}
        return one.get("source"), one.get("vllm"), versions

    return told(before) == told(about)


def result(about: dict[str, Any], done: dict[str, list[Case]], planned: dict[str, list[Any]]) -> dict[str, Any]:
    """All that is known so far."""
    cases = [one for some in done.values() for one in some]
    lacking = {part: len(planned[part]) - len(done[part]) for part in planned if len(planned[part]) > len(done[part])}
    return {
        "conditions": about,
        "complete": not lacking,
        "lacking": lacking,
        "all_equal": all(one["tokens_equal"] == one["tokens"] for one in cases),
        "prompts": sum(one["prompts"] for one in cases),
        "tokens": sum(one["tokens"] for one in cases),
        "cases": done,
    }


def write(out: Path | None, found: dict[str, Any]) -> None:
    """Replaces the file at once, so that an interruption leaves one that can be read."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        beside = out.with_suffix(".part")
        beside.write_text(json.dumps(found, indent=2) + "\n")
        beside.replace(out)


if __name__ == "__main__":
    main()
