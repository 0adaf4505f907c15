"""What it saves to drop visual tokens inside a vision tower and not behind it, on the geometry of Qwen2.5-VL-3B or
InternVL3-2B.

    python -m benchmarks.tower_cut --out benchmarks/results/tower_cut_cpu.json
    python -m benchmarks.tower_cut --family internvl --side 32 --out benchmarks/results/tower_cut_internvl_cpu.json

Qwen's tower has 32 layers of width 1280, of which 7, 15, 23 and 31 see whole images, the language model 36 layers of
width 2048; InternVL's 24 of width 1024, in which a tile sees itself, and 28 of width 1536. ``--share 4`` builds a
quarter of the layers of both, with full attention at the same relative places. Weights are random, which changes no
cost, and the layers of a stack share theirs, so that they fit into memory: of Qwen 79 MB of each layer of the tower and
308 MB of each of the decoder are read anew, as no cache holds them. The vocabulary is small.

Measured is CPU time of one thread until the first token: image, selection and prompt. Each variant runs once while its
operations are counted, then ``--repeats`` times, in turns; medians, with the least and the most.

- ``behind``: FlowCut keeps a third of the tokens, chosen by all layers that see whole images, behind the tower.
- ``inside``: a third, chosen after the first quarter of the layers (``tower_depth=0.25``), inside it.
- ``inside_published``: a third, inside, by the published schedule, whose last cut comes at the end. Random weights
  attend to everything alike, which that schedule answers with late cuts.
- ``two_stages_*``: the same with the second stage that is published for Qwen: two thirds enter the language model, and
  its second layer leaves a third.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
)

import llm_accel
from benchmarks.common import conditions, cpu_seconds, publish
from benchmarks.vision_ttft import COUNTED, first_token
from llm_accel import FlowCut

LAYERS = {"qwen2_5_vl": (32, 36), "internvl": (24, 28)}  # of tower and decoder
WHOLE = (7, 15, 23, 31)
IMAGE, START, END = 5, 6, 7
RATIO = 1 / 3

VARIANTS: dict[str, FlowCut | None] = {
    "dense": None,
    "behind": FlowCut(ratio=RATIO, llm_stage="off", tower_stage="behind"),
    "inside": FlowCut(ratio=RATIO, llm_stage="off", tower_depth=0.25),
    "inside_published": FlowCut(ratio=RATIO, llm_stage="off"),
    "two_stages_behind": FlowCut(ratio=RATIO, llm_stage="on", tower_stage="behind"),
    "two_stages_inside": FlowCut(ratio=RATIO, llm_stage="on", tower_depth=0.25),
}


def build_model(share: int, narrow: int = 1, family: str = "qwen2_5_vl") -> PreTrainedModel:
    """The model in fp32, with one in ``share`` layers, ``narrow`` times as narrow."""
    torch.manual_seed(0)
    model = (_internvl if family == "internvl" else _qwen)(narrow).eval()
    decoder, (tower_layers, decoder_layers) = model.model.language_model, LAYERS[family]
    if family == "internvl":
        encoder = model.model.vision_tower.encoder
        encoder.layer = _stack(encoder.layer[0], tower_layers // share)
    else:
        tower = model.model.visual
        tower.blocks = _stack(tower.blocks[0], tower_layers // share)
        tower.fullatt_block_indexes = [(layer + 1) // share - 1 for layer in WHOLE]
    decoder.layers = _stack(decoder.layers[0], decoder_layers // share)
    for index, layer in enumerate(decoder.layers):
        layer.self_attn.layer_idx = index
    decoder.config.num_hidden_layers = len(decoder.layers)
    decoder.config.layer_types = decoder.config.layer_types * len(decoder.layers)
    model.generation_config.eos_token_id = None
    model.generation_config.suppress_tokens = [IMAGE]
    return model


def _qwen(narrow: int) -> PreTrainedModel:
    """One layer of both stacks of Qwen2.5-VL-3B."""
    vision = {"depth": 1, "hidden_size": 1280 // narrow, "num_heads": 16, "intermediate_size": 3420 // narrow}
    text = {
        "hidden_size": 2048 // narrow,
        "intermediate_size": 11008 // narrow,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "num_hidden_layers": 1,
        "vocab_size": 1024,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [size // narrow for size in (16, 24, 24)],
        },
    }
    config = Qwen2_5_VLConfig(
        vision_config=vision | {"out_hidden_size": 2048 // narrow, "fullatt_block_indexes": [0]},
        text_config=text,
        image_token_id=IMAGE,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def _internvl(narrow: int) -> PreTrainedModel:
    """One layer of both stacks of InternVL3-2B, for tiles of any size."""
    vision = {
        "num_hidden_layers": 1,
        "hidden_size": 1024 // narrow,
        "num_attention_heads": 16,
        "intermediate_size": 4096 // narrow,
    }
    text = {
        "hidden_size": 1536 // narrow,
        "intermediate_size": 8960 // narrow,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "num_hidden_layers": 1,
        "vocab_size": 1024,
    }
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(**vision), text_config=Qwen2Config(**text), image_token_id=IMAGE
    )
    return InternVLForConditionalGeneration(config)


def _stack(layer: nn.Module, count: int) -> nn.ModuleList:
    """``count`` layers, modules of their own with the weights and the configuration of one."""
    shared: dict[int, Any] = {id(weight): weight for weight in layer.parameters()}
    shared |= {id(part.config): part.config for part in layer.modules() if hasattr(part, "config")}
    return nn.ModuleList([copy.deepcopy(layer, dict(shared)) for _ in range(count)])


def make_prompt(side: int, text: int, family: str = "qwen2_5_vl") -> dict[str, Tensor]:
    """An image of noise, in InternVL one tile, ``side`` x ``side`` patches, in the middle of ``text`` tokens."""
    draw = torch.Generator().manual_seed(1)
    words = torch.randint(10, 1024, (1, text), generator=draw)
    image = torch.full((1, side * side // 4), IMAGE)
    around = [torch.full((1, 1), token) for token in (START, END)]
    ids = torch.cat([words[:, : text // 2], around[0], image, around[1], words[:, text // 2 :]], dim=1)
    prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family == "internvl":
        return prompt | {"pixel_values": torch.randn(1, 3, side * 14, side * 14, generator=draw)}
    return prompt | {
        "mm_token_type_ids": (ids == IMAGE).int(),
        "pixel_values": torch.randn(side * side, 3 * 2 * 14 * 14, generator=draw),
        "image_grid_thw": torch.tensor([[1, side, side]]),
    }


def applied(model: PreTrainedModel, method: FlowCut | None) -> AbstractContextManager[Any]:
    """The model with a method, or as it is."""
    return nullcontext() if method is None else llm_accel.apply(model, method)


def kept(model: PreTrainedModel, prompt: dict[str, Tensor], method: FlowCut) -> set[int]:
    """Which tokens of the image reach the language model."""
    with applied(model, method):
        image = {name: prompt[name] for name in ("pixel_values", "image_grid_thw") if name in prompt}
        output = model.model.get_image_features(**image, return_dict=True)
    return set((~output.pooler_output[0][:, -1].isnan()).nonzero()[:, 0].tolist())


def measure(model: PreTrainedModel, prompt: dict[str, Tensor], repeats: int, names: Sequence[str]) -> dict[str, Any]:
    """Seconds, operations and visual tokens behind the last layer of each of these variants."""
    gflop, tokens = {}, {}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        method = VARIANTS[name]
        counter = FlopCounterMode(display=False, custom_mapping=COUNTED)
        with applied(model, method) as handle, counter:
            first_token(model, prompt)
            if handle is not None:
                tokens[name] = handle.report().visual_tokens_after
        gflop[name] = counter.get_total_flops() / 1e9
    for _ in range(repeats):
        for name in names:
            with applied(model, VARIANTS[name]):
                seconds[name].append(cpu_seconds(lambda: first_token(model, prompt))[0])
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "seconds": {name: [median[name], min(values), max(values)] for name, values in seconds.items()},
        "gflop": gflop,
        "visual_tokens_after": tokens,
        "behind_over_inside": {stages: _ratios(median, gflop, stages) for stages in ("", "two_stages_")},
    }


def _ratios(seconds: dict[str, float], gflop: dict[str, float], stages: str) -> dict[str, float]:
    """How many times faster inside is than behind, measured and by operations; nothing where one was left out."""
    behind, inside = f"{stages}behind", f"{stages}inside"
    if behind not in seconds or inside not in seconds:
        return {}
    return {"measured": seconds[behind] / seconds[inside], "counted": gflop[behind] / gflop[inside]}


@torch.inference_mode()
def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="qwen2_5_vl", choices=tuple(LAYERS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--variants", default=",".join(VARIANTS), help="which of them, by name, with commas between")
    parser.add_argument("--share", type=int, default=1, choices=(1, 2, 4), help="build one in so many layers")
    parser.add_argument("--narrow", type=int, default=1, choices=(1, 2, 4), help="so many times as narrow, for tests")
    parser.add_argument("--side", type=int, default=36, help="patches of the image in each direction, even")
    parser.add_argument("--text", type=int, default=50, help="tokens of text")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = build_model(args.share, args.narrow, args.family)
    prompt, (tower_layers, decoder_layers) = make_prompt(args.side, args.text, args.family), LAYERS[args.family]
    name = "InternVL3-2B" if args.family == "internvl" else "Qwen2.5-VL-3B"
    result = conditions(
        model=f"random weights, {name}'s geometry",
        tower_layers=tower_layers // args.share,
        decoder_layers=decoder_layers // args.share,
        narrow=args.narrow,
        patches=args.side**2,
        text=args.text,
        repeats=args.repeats,
        variants={name: "dense" if method is None else method.spec() for name, method in VARIANTS.items()},
    )
    early, late = (kept(model, prompt, VARIANTS[name] or FlowCut()) for name in ("inside", "behind"))
    result["tokens_kept_by_both"] = len(early & late) / len(late)
    publish(result | measure(model, prompt, args.repeats, args.variants.split(",")), args.out)


if __name__ == "__main__":
    main()
