"""How many rows fit, how fast a step can be, how many GPUs a load needs: arithmetic, nothing is measured.

python -m benchmarks.scale                                            # the tables of docs/guides/scale.md
python -m benchmarks.scale --shape qwen3-8b --gpus 1,2 --length 16k --answer 512 --budget 1024 --memory 141e9
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch

from llm_accel.eval.cost import ModelCost, head_dim
from llm_accel.eval.lengths import length_label, parse_lengths
from llm_accel.eval.tasks.bench.shapes import build, shape_config
from scripts.result_tables import markdown

DEFAULT = {"llama-3.1-8b": (1, 2), "llama-3.1-70b": (4, 8)}


@dataclass(frozen=True)
class Gpu:
    """A card as its data sheet has it; defaults: H100 SXM.

    Attributes:
        memory: bytes.
        bandwidth: bytes per second.
        flop: dense bfloat16 operations per second.
        usable: share of the memory for weights and caches, the rest for activations and fragments.
        reached: share of ``flop`` that a prefill reaches.
    """

    memory: float = 80e9
    bandwidth: float = 3.35e12
    flop: float = 989e12
    usable: float = 0.9
    reached: float = 0.4


@dataclass(frozen=True)
class Load:
    """Requests of one kind: tokens of prompt and answer, and KV entries kept of the prompt, None: all."""

    length: int
    answer: int
    budget: int | None

    @property
    def entries(self) -> int:
        """Entries per KV head and layer at the end of an answer."""
        return (self.length if self.budget is None else self.budget) + self.answer


@dataclass(frozen=True)
class Model:
    """A geometry in bfloat16 on ``gpus`` cards that share weights and KV heads."""

    work: ModelCost
    token_bytes: int
    gpus: int

    @classmethod
    def of(cls, shape: str, gpus: int) -> Model:
        config = shape_config(shape)
        work = ModelCost.of(build(config, torch.bfloat16, torch.device("meta"), None, 0))
        return cls(work, 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim(config) * 2, gpus)

    def rows(self, gpu: Gpu, load: Load) -> int:
        """Requests whose caches fit next to the weights."""
        return int((self.gpus * gpu.usable * gpu.memory - self.work.weight_bytes) // (self.token_bytes * load.entries))

    def step_s(self, gpu: Gpu, load: Load, rows: int) -> float:
        """Seconds in which the cards can read weights and caches once: no step is faster."""
        moved = self.work.step_bytes + rows * self.token_bytes * load.entries
        return moved / (self.gpus * gpu.bandwidth)

    def prompt_s(self, gpu: Gpu, load: Load) -> float:
        """Seconds that a dense prefill takes at the share of the peak that is assumed."""
        return self.work.prompt_flop(load.length, 1) / (self.gpus * gpu.flop * gpu.reached)

    def gpu_s(self, gpu: Gpu, load: Load, rows: int) -> float:
        """Seconds of one card that a request costs, where ``rows`` of them decode together."""
        return self.gpus * (self.prompt_s(gpu, load) + load.answer * self.step_s(gpu, load, rows) / rows)


def tables(shapes: dict[str, tuple[int, ...]], gpu: Gpu, length: int, answer: int, budget: int) -> str:
    """Weights and entries; rows, steps and cost of a request, dense and compressed."""
    sizes, fits = [], []
    for shape, counts in shapes.items():
        one = Model.of(shape, 1)
        weights, whole = one.work.weight_bytes, one.token_bytes * length
        sizes.append(
            [
                shape,
                f"{weights / 1e9:.1f} GB",
                f"{one.token_bytes / 2**10:.0f} KiB",
                f"{whole / 1e9:.2f} GB",
                f"{one.token_bytes * budget / 1e9:.2f} GB",
            ]
        )
        for gpus in counts:
            model = Model(one.work, one.token_bytes, gpus)
            for load in (Load(length, answer, None), Load(length, answer, budget)):
                rows = model.rows(gpu, load)
                kept = "dense" if load.budget is None else f"budget {budget}"
                if rows < 1:
                    fits.append([shape, str(gpus), kept, "0", *["-"] * 5])
                    continue
                alone, full = model.step_s(gpu, load, 1), model.step_s(gpu, load, rows)
                cost = model.gpu_s(gpu, load, rows)
                fits.append(
                    [
                        *(shape, str(gpus), kept, str(rows)),
                        f"{1e3 * alone:.1f}",
                        f"{1e3 * full:.1f}",
                        f"{rows / full / gpus:,.0f}",
                        f"{model.prompt_s(gpu, load):.2f}",
                        f"{cost:.2f}",
                    ]
                )
    label = length_label(length)
    first = ["model, bfloat16", "weights", "KV per token", f"KV of {label}", f"KV of {budget} entries"]
    second = ["model", "GPUs", "cache", "rows that fit", "ms per step, 1 row", "ms per step, all rows"]
    return (
        markdown(first, sizes)
        + "\n"
        + markdown([*second, "tokens/s per GPU", "s per prompt", "GPU s per request"], fits)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", help=f"a shape of `llm-accel bench` (default: {' and '.join(DEFAULT)})")
    parser.add_argument("--gpus", default="1,2,4,8", help="cards that share the model, with --shape")
    parser.add_argument("--length", default="32k")
    parser.add_argument("--answer", type=int, default=1024)
    parser.add_argument("--budget", type=int, default=2048)
    for name, value in Gpu().__dict__.items():
        parser.add_argument(f"--{name}", type=float, default=value, help="of a card (default: %(default)s)")
    args = parser.parse_args()
    gpu = Gpu(args.memory, args.bandwidth, args.flop, args.usable, args.reached)
    shapes = DEFAULT if args.shape is None else {args.shape: tuple(int(n) for n in args.gpus.split(","))}
    print(tables(shapes, gpu, parse_lengths(args.length)[0], args.answer, args.budget), end="")


if __name__ == "__main__":
    main()
