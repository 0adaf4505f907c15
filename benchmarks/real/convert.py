"""A GGUF file to a folder that ``from_pretrained`` reads: ``python -m benchmarks.real.convert FILE FOLDER``.

A process of its own, because only it may see the package ``gguf``. transformers loads a GGUF file with its weights
dequantised, but does not save such a model: its values go into a model made anew from the configuration, in bfloat16.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel


def without_quantization(model: PreTrainedModel) -> PreTrainedModel:
    """The same model as one that was never quantised."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = type(model)(config).to(torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain


def convert(gguf: Path, folder: Path) -> None:
    """Weights, configuration and tokenizer."""
    place, name = str(gguf.parent), gguf.name
    model = AutoModelForCausalLM.from_pretrained(place, gguf_file=name, dtype=torch.bfloat16)
    without_quantization(model).save_pretrained(folder)
    AutoTokenizer.from_pretrained(place, gguf_file=name).save_pretrained(folder)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("gguf", type=Path)
    arguments.add_argument("folder", type=Path)
    convert(**vars(arguments.parse_args()))
