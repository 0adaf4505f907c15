"""What the needle tests share: tokenizers of three kinds, a tiny model, an engine that answers as told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llm_accel.eval.engine import TextEngine, TextOutcome
from llm_accel.eval.prompts import grammar
from llm_accel.eval.prompts.encoding import Encoder, make_frame
from llm_accel.eval.prompts.haystack import Haystack, load_haystack
from llm_accel.eval.prompts.maker import TextPrompt
from llm_accel.eval.tasks.needle.settings import NeedleSettings
from llm_accel.eval.tasks.needle.task import NeedleMaker
from llm_accel.methods import MethodConfig
from llm_accel.registry import spec_of
from training.needle_tokenizer import build_tokenizer, intro_text

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CORPUS = [
    intro_text(), grammar.needle_text("opal", "1234567"), grammar.question_text(["opal"]),
    grammar.answer_prefix(["opal"]), "The dog watched the old river near the house 12 345 6789012. It was 1 2 3.",
]  # fmt: skip


@cache
def tokenizer(kind: str = "bundled") -> Any:
    """``bundled``; ``spaces``: puts a space in front of every text (Llama-2); ``joined``: " 12" is one token."""
    if kind == "bundled":
        return build_tokenizer()
    backend: Any = Tokenizer(models.BPE(unk_token="<unk>") if kind == "spaces" else models.BPE())
    if kind == "spaces":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        backend.decoder = decoders.Metaspace(prepend_scheme="always")
        alphabet = [chr(i) for i in range(33, 127)]
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(_CORPUS * 5 + [" 1 12 123 1234 12345 123456"] * 9, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=CHATML
    )


def make_maker(kind: str = "bundled", **options: Any) -> NeedleMaker:
    """A prompt maker on the built-in haystack."""
    settings = NeedleSettings(**options)
    encoder = Encoder(tokenizer(kind))
    frame = make_frame(encoder, settings.chat_template)
    return NeedleMaker(encoder, frame, haystack(kind, settings.haystack), settings)


@cache
def haystack(kind: str, source: str) -> Haystack:
    """The haystack of a tokenizer, encoded once."""
    return load_haystack(source, Encoder(tokenizer(kind)), 40_000)


@cache
def tiny_model() -> Any:
    """A random two-layer Llama with the bundled tokenizer's vocabulary."""
    torch.manual_seed(0)
    end = tokenizer().eos_token_id
    config = LlamaConfig(
        vocab_size=len(tokenizer()), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=1024, eos_token_id=end, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


class ToldEngine(TextEngine):
    """Answers right where ``right(method, prompt)`` says so; counts its calls and can fail at one."""

    def __init__(
        self, right: Callable[[str, TextPrompt], bool] = lambda method, prompt: True, fail_at: int = -1
    ) -> None:
        self.right, self.fail_at, self.calls = right, fail_at, 0
        self.query_agnostic = False
        self.seen: list[tuple[str, tuple[int, ...]]] = []

    def run(self, prompts: Sequence[TextPrompt], configs: Sequence[MethodConfig]) -> TextOutcome:
        if self.calls == self.fail_at:
            raise RuntimeError("the machine went away")
        self.calls += 1
        method = spec_of(configs)
        self.seen += [(method, prompt.ids) for prompt in prompts]
        texts = [" and ".join(p.expected) + "." if self.right(method, p) else "none." for p in prompts]
        answers = [tokenizer().encode(text, add_special_tokens=False) for text in texts]
        prompt = (50, 200) if configs else None
        return TextOutcome(answers, 100, 200, prefill_ms=1.0, decode_ms=2.0, prompt_bytes=prompt)
