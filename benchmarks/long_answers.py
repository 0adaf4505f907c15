"""Whether a long answer still knows what it found out early, under caches that are capped while decoding.

    python -m benchmarks.long_answers --model smollm2-135m --out benchmarks/results/long_answers_cpu.json

A question, the beginning of an answer that states a code, then hundreds of steps of work, and the code again. The
work is written here and read in pieces of ``--piece`` tokens, after each of which the cache is cut, as
``recompress_every`` cuts it while decoding; the code at the end is generated. ``repeated``: the steps are nearly the
same sentence every time. ``varied``: other sentences every time.

The row ``redundancy`` is SnapKV with a term that R-KV (arXiv 2505.24133) adds for such answers: entries whose keys
resemble later keys count less. It is a row of this table and no method of the package, unless it earns its place here.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

import llm_accel
from benchmarks.common import conditions, publish
from llm_accel import SnapKV
from llm_accel.common.arguments import ModelOptions
from llm_accel.common.loading import load_text_model
from llm_accel.common.statistics import wilson
from llm_accel.eval.prompts.grammar import filler_sentences
from llm_accel.methods import MethodConfig
from llm_accel.methods.base import option
from llm_accel.methods.prompt_view import PromptView
from llm_accel.patches.cache_name import CACHE
from llm_accel.registry import parse

PLACES = ("red box", "old lock", "iron gate", "blue safe", "third drawer", "north door")
ASKED = "<|im_start|>user\nFind the code of the {place}, then go through the list.<|im_end|>\n<|im_start|>assistant\n"
FOUND = "The code of the {place} is {code}. I must remember that.\n"
REPEATED = "Step {step}: I check the list again. Entry {entry} does not match, so I go on to the next one.\n"
AGAIN = "\nNow I need the code of the {place} again. The code of the {place} is"


@dataclass(frozen=True)
class Redundancy(SnapKV):
    """SnapKV's votes, less what an entry's key has in common with later keys."""

    weight: float = option("of the redundancy", 0.9)

    name: ClassVar[str] = "redundancy"

    def score_and_tie_break(self, view: PromptView) -> tuple[Tensor, Tensor | None]:
        pooled, raw = self.votes(view)
        keys = F.normalize(view.key.float(), dim=-1).masked_fill(~view.valid.view(-1, 1, view.slots, 1), 0)
        later = torch.ones(view.slots, view.slots, dtype=torch.bool).triu(1)[: pooled.shape[-1]]
        alike = (keys[:, :, : pooled.shape[-1]] @ keys.transpose(2, 3)).masked_fill(~later, 0).sum(-1) / later.sum(-1)
        return self.scores_of(pooled * (1 - self.weight * alike.clamp(0, 1)), raw)


def rows(budget: int, piece: int) -> dict[str, MethodConfig]:
    """The methods at one budget, by the name of their row."""
    capped: dict[str, Any] = {"budget": budget, "recompress_every": piece}
    return {
        "snapkv": SnapKV(**capped),
        "redundancy": Redundancy(**capped),
        "adakv": parse(f"adakv:budget={budget},recompress_every={piece}"),
        "h2o": parse(f"h2o:budget={budget}"),
        "streaming_llm": parse(f"streaming_llm:budget={budget}"),
    }


def write(tokenizer: Any, kind: str, tokens: int, rng: random.Random) -> tuple[str, str, str, str]:
    """What is asked and found, the steps, how the code is asked for again, and the code."""
    told = {"place": rng.choice(PLACES), "code": "".join(rng.choices("0123456789", k=7))}
    sentences = filler_sentences(rng) if kind == "varied" else None
    steps, count, length = "", 0, 0
    while length < tokens:
        count += 1
        text = REPEATED.format(step=count, entry=rng.randrange(100)) if sentences is None else next(sentences) + " "
        steps, length = steps + text, length + len(tokenizer(text).input_ids)
    return (ASKED + FOUND).format(**told), steps, AGAIN.format(**told), told["code"]


@torch.inference_mode()
def finds(model: Any, tokenizer: Any, config: MethodConfig | None, texts: Sequence[str], piece: int) -> bool:
    """Whether the code is generated again."""
    begin, steps, again, code = texts
    ids = [tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids for text in (begin, steps, again)]
    with llm_accel.apply(model, "dense" if config is None else config) as handle:
        cache = handle.new_cache()
        for part in (ids[0], *ids[1].split(piece, dim=1), ids[2]):
            logits = model(part, **{CACHE: cache}, logits_to_keep=1).logits
        said = []
        for _ in range(len(tokenizer(f" {code}").input_ids) + 1):
            said.append(int(logits[0, -1].argmax()))
            logits = model(torch.tensor([said[-1:]]), **{CACHE: cache}).logits
    return code in tokenizer.decode(said)


def main() -> None:
    """Measures; prints or writes one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--kind", nargs="+", choices=("repeated", "varied"), default=["repeated", "varied"])
    parser.add_argument("--budget", type=int, nargs="+", default=[112, 128, 192])
    parser.add_argument("--tokens", type=int, default=1500, help="of the steps")
    parser.add_argument("--piece", type=int, default=64)
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model, tokenizer, _ = load_text_model(ModelOptions(model=args.model, dtype="float32"))
    methods: dict[str, MethodConfig | None] = {"dense": None}
    methods |= {f"{name} {budget}": one for budget in args.budget for name, one in rows(budget, args.piece).items()}
    found: dict[str, dict[str, Any]] = {}
    for kind in args.kind:
        rng = random.Random(args.seed)
        prompts = [write(tokenizer, kind, args.tokens, rng) for _ in range(args.samples)]
        found[kind] = {}
        for name, config in methods.items():
            right = sum(finds(model, tokenizer, config, texts, args.piece) for texts in prompts)
            found[kind][name] = {"right": right, "of": len(prompts), "ci95": wilson(right, len(prompts))}
            print(f"{kind:9} {name:20} {right}/{len(prompts)}", flush=True)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    publish({"settings": settings, "conditions": conditions(), "found": found}, args.out)


if __name__ == "__main__":
    main()
