"""FlowCut on prompts of LLaVA-1.5's shape: counted operations, and time to the first token on one CPU thread.

    python -m benchmarks.vision_ttft --out benchmarks/results/vision_ttft_cpu.json

A prompt has 576 visual tokens and 80 of text; 64 visual tokens stay. Weights are random, which changes no cost.

- Operations are counted by ``torch.utils.flop_counter`` while the patched and the unpatched model run. The decoder has
  LLaVA-1.5-7B's layer (hidden 4096, 32 heads, MLP 11008) once: all 32 are alike and see the same rows, so the share is
  that of the whole decoder. Attention is counted without its causal half, in both.
- Time is CPU time of one thread: a CLIP-L/336 tower (24 layers, hidden 1024) in front of a decoder of 12 layers, hidden
  1024. ``share_of_bound`` is the measured speed-up over the ratio of counted operations of the whole prompt, tower
  included: what is lost to everything that is no product of matrices. ``probe_overhead`` is what scoring costs the
  tower when no patch leaves. Runs are interleaved; medians, with the least and the most.
"""

from __future__ import annotations

import argparse
import re
import statistics
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, PreTrainedModel

import llm_accel
from benchmarks.common import conditions, cpu_seconds, publish

VISUAL, TEXT, BUDGET = 576, 80, 64
IMAGE = 5
_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # the counter does not know it


def build_model(tower: dict[str, int], decoder: dict[str, int]) -> PreTrainedModel:
    """A random-weight LLaVA in fp32 with 576 visual tokens."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(image_size=336, patch_size=14, **tower)
    text = LlamaConfig(vocab_size=1024, max_position_embeddings=4096, **decoder)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, image_seq_length=VISUAL)
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.suppress_tokens = [IMAGE]
    return model


def make_prompt() -> dict[str, torch.Tensor]:
    """An image of noise between two halves of the text."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(10, 1024, (1, TEXT), generator=generator)
    ids = torch.cat([text[:, : TEXT // 2], torch.full((1, VISUAL), IMAGE), text[:, TEXT // 2 :]], dim=1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, 3, 336, 336, generator=generator),
    }


def applied(model: PreTrainedModel, budget: int | None) -> AbstractContextManager[Any]:
    """The model with FlowCut, which leaves ``budget`` visual tokens; None: as it is."""
    return nullcontext() if budget is None else llm_accel.apply(model, "flowcut", budget=budget)


def first_token(model: PreTrainedModel, prompt: dict[str, torch.Tensor]) -> None:
    """The prompt and one new token."""
    model.generate(**prompt, max_new_tokens=1, do_sample=False)


def counted(model: PreTrainedModel, prompt: dict[str, torch.Tensor], budget: int | None) -> dict[str, int]:
    """Floating-point operations until the first token: of the decoder, of the tower, of everything."""
    counter = FlopCounterMode(display=False, custom_mapping=COUNTED)
    with applied(model, budget), counter:
        first_token(model, prompt)
    modules = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    layers = {"decoder": r"language_model\.layers\.\d+", "tower": r"encoder\.layers\.\d+"}
    found = {part: sum(n for name, n in modules.items() if re.search(f"{end}$", name)) for part, end in layers.items()}
    return found | {"all": modules["Global"]}


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Operations of one attention call, from shapes, as the counter has them for its other kernels."""
    return sdpa_flop_count(query, key, value)


COUNTED = {_CPU_ATTENTION: _attention}
"""What the counter must be told."""


def shares(decoder_layers: int) -> dict[str, Any]:
    """Operations of LLaVA-1.5-7B's decoder at the budget, over those of the dense prompt."""
    decoder = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 4}
    model, prompt = build_model(tower, decoder | {"num_hidden_layers": decoder_layers}), make_prompt()
    dense, ours = (counted(model, prompt, budget)["decoder"] for budget in (None, BUDGET))
    return {
        "dense_gflop_per_layer": dense / decoder_layers / 1e9,
        "flowcut_gflop_per_layer": ours / decoder_layers / 1e9,
        "share": ours / dense,
        "decoder_layers_counted": decoder_layers,
    }


def times(repeats: int, tower_layers: int, decoder_layers: int) -> dict[str, Any]:
    """Time to the first token, of the tower with and without scoring, and how near the speed-up is to its bound."""
    wide = {"hidden_size": 1024, "num_attention_heads": 16}
    tower = wide | {"intermediate_size": 4096, "num_hidden_layers": tower_layers}
    model = build_model(tower, wide | {"intermediate_size": 2816, "num_hidden_layers": decoder_layers})
    prompt = make_prompt()
    pixels = prompt["pixel_values"]
    flops = {name: counted(model, prompt, budget) for name, budget in (("dense", None), ("flowcut", BUDGET))}

    def encode_image() -> None:
        model.base_model.get_image_features(pixel_values=pixels)

    measured: dict[str, list[float]] = {"dense": [], "flowcut": [], "tower": [], "tower_scored": []}
    for _ in range(repeats):
        for name, budget in (("dense", None), ("flowcut", BUDGET)):
            with applied(model, budget):
                measured[name].append(cpu_seconds(lambda: first_token(model, prompt))[0])
        measured["tower"].append(cpu_seconds(encode_image)[0])
        with applied(model, VISUAL):
            measured["tower_scored"].append(cpu_seconds(encode_image)[0])
    median = {name: statistics.median(values) for name, values in measured.items()}
    bound = flops["dense"]["all"] / flops["flowcut"]["all"]
    return {
        "seconds": {name: [median[name], min(values), max(values)] for name, values in measured.items()},
        "repeats": repeats,
        "gflop": {name: {part: n / 1e9 for part, n in parts.items()} for name, parts in flops.items()},
        "speedup": median["dense"] / median["flowcut"],
        "bound": bound,
        "share_of_bound": median["dense"] / median["flowcut"] / bound,
        "probe_overhead": median["tower_scored"] / median["tower"] - 1,
        "tower_layers": tower_layers,
        "decoder_layers": decoder_layers,
    }


@torch.inference_mode()
def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tower-layers", type=int, default=24)
    parser.add_argument("--decoder-layers", type=int, default=12)
    parser.add_argument("--skip-times", action="store_true", help="count operations only")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = conditions(model="random-weight LLaVA", visual=VISUAL, text=TEXT, budget=BUDGET)
    result["llava_1_5_7b_decoder"] = shares(decoder_layers=1)
    if not args.skip_times:
        result["cpu"] = times(args.repeats, args.tower_layers, args.decoder_layers)
    publish(result, args.out)


if __name__ == "__main__":
    main()
