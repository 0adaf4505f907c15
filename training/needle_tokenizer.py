"""The bundled model's tokenizer: byte-level BPE with one token per grammar word and per group of up to three digits.

It splits text as Llama-3 does (digits in groups of up to three, left to right, the space before them a token of its
own) and, like Llama-3, takes a piece that is in the vocabulary whole (``ignore_merges``). It has no merges beyond that:
any other text falls back to its bytes, so nothing is ever unknown and decoding gives back exactly the text.
The format was fixed before any compression method was scored: see docs/decisions/needle-format.md.
"""

from __future__ import annotations

import re
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from llm_accel.eval.prompts import grammar

PAD, BOS, EOS, SYSTEM, USER, ASSISTANT = "<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"
SPECIALS = (PAD, BOS, EOS, SYSTEM, USER, ASSISTANT)

# Llama-3's split (also GPT-4's, up to the details of whitespace).
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# No end tag after the user's turn: fewer tokens between the question and the answer.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def intro_text(kind: grammar.Kind = "number") -> str:
    """An optional first paragraph that tells a model what is coming (as RULER's prompt does)."""
    return (
        f"Some special magic {kind}s are hidden in the following text. "
        f"Remember the {kind}s because you will be asked about them."
    )


def vocabulary() -> list[str]:
    """Every word of the grammar as it is tokenized, sorted: with its leading space, and bare where it starts a text."""
    keys, values = ["KEY", "KEY", "KEY"], ["NOUN"]
    kinds: list[grammar.Kind] = ["word", "number", "uuid"]
    texts = [*grammar.TEMPLATES, *grammar.HARD_TEMPLATES]
    for kind in kinds:
        texts += [intro_text(kind), grammar.needle_text(keys[0], values[0], kind)]
        for n in (1, 2):
            texts += [grammar.question_text(keys[:n], kind), grammar.answer_prefix(keys[:n], kind)]
    plain = {word for text in texts for word in re.findall(r"[A-Za-z]+", text)} - {*grammar.POOLS, "NUM"}
    starters = {word for word in plain if word[0].isupper()}
    pools = {word for pool in grammar.POOLS.values() for word in pool}
    return sorted({" " + word for word in plain | pools} | starters)


def build_vocab() -> dict[str, int]:
    """Token -> id: specials, 256 bytes, every group of one to three digits, the grammar's words (``Ġ`` is a space)."""
    groups = [f"{i:0{width}d}" for width in (1, 2, 3) for i in range(10**width)]
    words = [word.replace(" ", "Ġ") for word in vocabulary()]
    tokens = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *groups, *words]
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}


def build_tokenizer(model_max_length: int = 16384) -> PreTrainedTokenizerFast:
    """The tokenizer, with bos added in front of plain text and the chat template set."""
    vocab = build_vocab()
    tokenizer: Any = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocab[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
    )
