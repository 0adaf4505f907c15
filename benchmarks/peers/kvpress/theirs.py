"""kvpress' side, in an environment that has kvpress and not this package: ``python theirs.py JOB RECORDS``.

JOB is a JSON object of ``model`` (a folder), ``dtype``, ``ends``, ``rows`` and ``prompts``; a line is appended to
RECORDS for each prompt and row that it lacks: the tokens of the answer, the bytes that the cache holds when the answer
begins, and the seconds until then.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

if __package__:
    from benchmarks.peers.kvpress.rows import Row, press
else:  # by its path, where the package of the benchmarks is not known
    sys.path.insert(0, str(Path(__file__).parent))
    from rows import Row, press


def held_bytes(cache: Any) -> int:
    """Bytes of the storage of keys and values."""
    return sum(t.untyped_storage().nbytes() for layer in cache.layers for t in (layer.keys, layer.values))


@torch.inference_mode()
def answer(model: Any, prompt: dict[str, Any], row: Row, ends: Sequence[int]) -> dict[str, Any]:
    """One prompt under one press: what it sees of the prompt is compressed at its end, the rest follows it."""
    ids = torch.tensor([prompt["ids"]])
    seen = prompt["context_length"] if row.agnostic else ids.shape[1]
    made, cache = press(row), DynamicCache()
    begin = time.perf_counter()
    with made(model) if made is not None else contextlib.nullcontext():
        logits = model(input_ids=ids[:, :seen], past_key_values=cache, logits_to_keep=1).logits
    if seen < ids.shape[1]:
        logits = _next(model, ids[:, seen:], seen, cache)
    seconds, held, tokens = time.perf_counter() - begin, held_bytes(cache), []
    for step in range(prompt["new_tokens"]):
        tokens.append(int(logits[0, -1].argmax()))
        if tokens[-1] in ends or step == prompt["new_tokens"] - 1:
            break
        logits = _next(model, torch.tensor([tokens[-1:]]), ids.shape[1] + step, cache)
    return {"tokens": tokens, "kv_bytes": held, "seconds": seconds}


def _next(model: Any, ids: torch.Tensor, position: int, cache: Any) -> torch.Tensor:
    """Logits after more tokens, whose positions go on from those of the whole prompt."""
    positions = torch.arange(position, position + ids.shape[1])[None]
    return model(input_ids=ids, past_key_values=cache, position_ids=positions, logits_to_keep=1).logits


def main(job_file: Path, records: Path) -> None:
    """Answers what is lacking."""
    job = json.loads(job_file.read_text())
    lines = records.read_text().splitlines() if records.exists() else []
    done = {(record["prompt"], record["agnostic"], record["row"]) for record in map(json.loads, lines)}
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"])).eval()
    rows = [Row(**row) for row in job["rows"]]
    with records.open("a") as file:
        for prompt in job["prompts"]:
            for row in rows:
                if (prompt["name"], row.agnostic, row.name) in done:
                    continue
                found = answer(model, prompt, row, job["ends"])
                about = {"prompt": prompt["name"], "agnostic": row.agnostic, "row": row.name}
                print(json.dumps(about | found), file=file, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
