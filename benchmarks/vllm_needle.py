"""Needles through vLLM: prompts and scores of `llm-accel needle`, answers of an engine per method, all in this process.

python -m benchmarks.vllm_needle --method dense --method snapkv:ratio=0.25 --lengths 1k,2k --depths 5   # bundled
python -m benchmarks.vllm_needle --model DIR --method dense --method snapkv:ratio=0.25 --task single --block-size 16
"""

from __future__ import annotations

import argparse
import gc
import json
import os
from typing import Any

from llm_accel.common.bundled import needle_model_path
from llm_accel.eval import grid
from llm_accel.eval.tasks.needle.scoring import score
from llm_accel.eval.tasks.needle.settings import NeedleSettings
from llm_accel.eval.tasks.needle.task import NeedleMaker


def engine(model: str, method: str, settings: NeedleSettings, block_size: int) -> Any:
    """An engine in this process, so that its scheduler can be asked what was freed."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM

    overrides = {} if method == "dense" else {"llm_accel": {"method": method}}
    longest = max(settings.lengths) + (settings.max_new_tokens or 256)
    return LLM(
        model, hf_overrides=overrides, dtype=settings.dtype if settings.dtype != "auto" else "float32",
        max_model_len=longest, enforce_eager=True, block_size=block_size, max_num_seqs=4, enable_prefix_caching=False,
    )  # fmt: skip


def run(model: str, method: str, settings: NeedleSettings, block_size: int) -> dict[str, Any]:
    """Exact matches of one method, and the blocks that it freed early."""
    from vllm import SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = engine(model, method, settings, block_size)
    try:
        maker = NeedleMaker.load(settings, llm.get_tokenizer())
        prompts = [maker.make(point) for point in grid.points(settings.lengths, settings.rows, settings.samples)]
        sampling = [SamplingParams(temperature=0, max_tokens=prompt.new_tokens) for prompt in prompts]
        done = llm.generate([{"prompt_token_ids": list(prompt.ids)} for prompt in prompts], sampling)
        found = [
            score(one.outputs[0].text, prompt.expected, settings.value_kind)["exact"]
            for one, prompt in zip(done, prompts, strict=True)
        ]
        coordinator = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.coordinator
        freed = getattr(coordinator.single_type_managers[0], "freed", 0)
        return {"method": method, "exact": sum(found) / len(found), "n": len(found), "blocks_freed": freed}
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def main() -> None:
    """Prints one JSON object per method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--block-size", type=int, default=32)
    NeedleSettings.add_arguments(parser)
    args = parser.parse_args()
    settings = NeedleSettings.from_arguments(args)
    model = settings.model or str(needle_model_path())
    for method in settings.methods:
        print(json.dumps(run(model, method, settings, args.block_size)), flush=True)


if __name__ == "__main__":
    main()
