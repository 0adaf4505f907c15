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

Each case is an engine of its own. Exit status 1 where any token differs.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import conditions, publish
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
    "qwen2_vl": ("flowcut",),
    "qwen2_5_vl": ("random_tokens", "flowcut", "visionzip:dominant=5,contextual=2"),
    "qwen3_vl": ("stride_tokens", "flowcut", "visionzip:dominant=5,contextual=2"),
}
TILED = {
    "llava_next": ("stride_tokens:budget=9", "random_tokens:ratio=0.4,newline=keep"),
    "llava_onevision": (
        "random_tokens:budget=9", "flowcut:budget=20,newline=keep", "visionzip:dominant=5,contextual=2",
    ),
    "internvl": ("stride_tokens:budget=7", "flowcut:budget=5", "visionzip:dominant=4,contextual=2"),
}  # fmt: skip
KV = ("snapkv:budget=200,window=32", "streaming_llm:budget=192", "random:budget=200")
LENGTHS, NEW = (700, 800, 100, 704), 60
SCHEDULES: dict[str, dict[str, Any]] = {
    "one step": {"async_scheduling": False},
    "chunks of 96": {"max_num_batched_tokens": 96},
    "asynchronous": {"async_scheduling": True},
    "own processes": {"processes": True},
}
Case = dict[str, Any]


def case(found: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]], **about: Any) -> Case:
    """One line of the result."""
    pairs = list(zip(found, wanted, strict=True))
    tokens = [(sum(a == b for a, b in zip(one, other, strict=False)), len(other)) for one, other in pairs]
    return {
        **about,
        "prompts": len(pairs),
        "prompts_equal": sum(list(one) == list(other) for one, other in pairs),
        "tokens": sum(count for _, count in tokens),
        "tokens_equal": sum(equal for equal, _ in tokens),
    }


def vision(scenes: int = 12) -> Iterator[Case]:
    """The bundled vision model."""
    for method in VISION:
        with kit.engine(vision_model_path(), method, max_model_len=512) as llm:
            found, placeholders = visual.scenes_in_vllm(llm, scenes)
        wanted = visual.scenes_in_transformers(method, scenes)
        yield case(found, wanted, model="bundled vision model", method=method or "dense", placeholders=placeholders[0])


def tiny(families: dict[str, tuple[str, ...]], count: int = 24, **options: Any) -> Iterator[Case]:
    """Tiny models with random weights; each engine is asked twice, the second time by prefix caching."""
    for family, methods in families.items():
        with tempfile.TemporaryDirectory() as name:
            folder = tiny_vision.save(family, Path(name))
            prompts = tiny_vision.prompts(family, 2 * count, count)[2 * count :]
            for method in methods:
                limited = {"max_num_batched_tokens": 12, "enable_prefix_caching": True} | visual.limits(method)
                with kit.engine(folder, method, **limited) as llm:
                    found, placeholders = visual.in_vllm(llm, prompts)
                    again, _ = visual.in_vllm(llm, prompts)
                wanted = visual.in_transformers(folder, prompts, method, **options)
                yield case(
                    [*found, *again], wanted * 2, model=f"tiny {family}", method=method,
                    placeholders=round(sum(placeholders) / len(placeholders), 1),
                )  # fmt: skip


def smollm(lengths: Sequence[int] = LENGTHS, new: int = NEW, methods: Sequence[str] = KV) -> Iterator[Case]:
    """A pretrained text model where one was fetched."""
    folder = checkpoint_path("smollm2-135m")
    folder = folder if is_fetched(folder) else needle_model_path()
    about, tokens = {"model": folder.name}, kit.prompts(lengths)
    for method in (None, *methods):
        wanted = kit.expected(tokens, method, new, folder)
        for name, options in SCHEDULES.items() if method is not None else [("one step", {})]:
            with kit.engine(folder, method, **options) as llm:
                found = kit.answers(llm, tokens, new)
                freed = None if options.get("processes") or method is None else kit.manager(llm).freed
            yield case(found, wanted, **about, method=method or "dense", schedule=name, blocks_freed=freed)
        if method is not None:
            yield _after_preemption(folder, method, new, about)


def _after_preemption(folder: Path, method: str, new: int, about: Case) -> Case:
    """Requests that lose their place on the way begin anew with prompt and reply, in transformers as well."""
    tokens = kit.prompts([400 + 8 * one for one in range(8)])
    options: dict[str, Any] = {"num_gpu_blocks_override": 40, "max_model_len": 512 + new, "async_scheduling": False}
    options |= {"enable_prefix_caching": False}  # it would give a stream its old entries back
    with kit.engine(folder, method, **options) as llm, kit.preempted(llm) as lengths:
        found = kit.answers(llm, tokens, new)
        freed = kit.manager(llm).freed
    restarts = [lengths.get(tuple(prompt), []) for prompt in tokens]
    wanted = kit.expected(tokens, method, new, folder, restarts)
    preemptions = sum(map(len, restarts))
    return case(
        found, wanted, **about, method=method, schedule="after preemption", blocks_freed=freed, preemptions=preemptions
    )


PARTS: dict[str, Callable[[], Iterator[Case]]] = {
    "vision": vision,
    "mrope": lambda: tiny(MROPE),
    "tiled": lambda: tiny(TILED, positions="compact"),
    "smollm": smollm,
}


def main() -> None:
    """Runs the parts, prints each case as it is done and all of them as one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=tuple(PARTS), help="default: all")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    import vllm

    about = conditions(model="see each case", vllm=vllm.__version__)
    parts = args.part or list(PARTS)
    cases: dict[str, list[Case]] = {part: [] for part in parts}
    for part in parts:
        for one in PARTS[part]():
            print(json.dumps(one), file=sys.stderr, flush=True)
            cases[part].append(one)
            if args.out:  # what an interrupted run leaves
                args.out.write_text(json.dumps(result(about, cases, complete=False), indent=2) + "\n")
    found = result(about, cases, complete=True)
    publish(found, args.out)
    sys.exit(0 if found["all_equal"] else 1)


def result(about: dict[str, Any], cases: dict[str, list[Case]], complete: bool) -> dict[str, Any]:
    """All that is known so far."""
    equal = all(one["tokens_equal"] == one["tokens"] for some in cases.values() for one in some)
    return {"conditions": about, "complete": complete, "all_equal": equal, "cases": cases}


if __name__ == "__main__":
    main()
