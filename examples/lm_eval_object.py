"""lm-evaluation-harness on a model that already carries a method: the harness needs no plug-in of ours for this.

    python examples/lm_eval_object.py --model Qwen/Qwen3-0.6B --method snapkv:budget=1024 --tasks niah_multikey_1

Without --model it takes the bundled needle model, which does nothing but look up needles:

    llm-accel ruler --write-samples samples.jsonl --lengths 2k --samples 5
    python examples/lm_eval_object.py --method snapkv:budget=256 --tasks llm_accel_ruler_niah --samples samples.jsonl
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

import llm_accel
from llm_accel.common.bundled import load_needle_model
from llm_accel.integrations.lm_eval_command import TASKS
from llm_accel.registry import parse_all


def evaluate(model: Any, tokenizer: Any, method: str, tasks: list[str], metadata: dict[str, Any]) -> dict[str, Any]:
    """Results of lm-eval, its samples included; the model is as before afterwards."""
    lm = HFLM(pretrained=model, tokenizer=tokenizer)
    manager = TaskManager(include_path=str(TASKS), metadata=metadata)
    with llm_accel.apply(model, list(parse_all(method))):
        return lm_eval.simple_evaluate(model=lm, tasks=tasks, task_manager=manager, metadata=metadata, log_samples=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="HuggingFace id or path (default: the bundled needle model)")
    parser.add_argument("--method", default="snapkv:budget=1024")
    parser.add_argument("--tasks", nargs="+", default=["llm_accel_ruler_niah"])
    parser.add_argument("--samples", help="file of llm-accel ruler --write-samples, for the tasks llm_accel_ruler_*")
    args = parser.parse_args()
    if args.model is None:
        model, tokenizer = load_needle_model()
    else:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto", device_map="auto")
    results = evaluate(model, tokenizer, args.method, args.tasks, {"tokenizer": args.model, "samples": args.samples})
    print(json.dumps({task: scores for task, scores in results["results"].items()}))


if __name__ == "__main__":
    main()
