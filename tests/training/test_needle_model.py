"""The bundled needle model: grammar, tokenizer, held-out keys, and that the dense model really finds needles."""

from __future__ import annotations

import random
from itertools import islice

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from llm_accel.common.bundled import load_needle_model, needle_model_path
from llm_accel.eval.prompts import grammar
from training import needle_tokenizer as nt
from training.needle_data import Mix, Texts
from training.train_needle import CURRICULUM, validate

Bundle = tuple[LlamaForCausalLM, PreTrainedTokenizerFast]


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    torch.set_num_threads(1)
    return load_needle_model()


def test_grammar_is_deterministic() -> None:
    first, second = (list(islice(grammar.filler_sentences(random.Random(3)), 50)) for _ in range(2))
    assert first == second
    assert all(sentence.endswith(".") for sentence in first)
    assert grammar.make_keys(random.Random(1), 4) == grammar.make_keys(random.Random(1), 4)


@pytest.mark.parametrize("kind", grammar.KEY_KINDS)
def test_keys_and_values(kind: grammar.Kind) -> None:
    rng = random.Random(0)
    keys = grammar.make_keys(rng, 20, kind)
    assert len(set(keys)) == 20
    value = grammar.make_value(rng, kind)
    answer = " " * (kind != "number") + f"{value}."
    assert grammar.exact_match(answer, [value], kind)
    assert not grammar.exact_match("nothing of the sort 42", [value], kind)
    assert grammar.recall(answer, [value]) == 1.0


def test_bad_requests_say_what_is_allowed() -> None:
    with pytest.raises(ValueError, match="pool holds 32"):
        grammar.make_keys(random.Random(0), 33)
    with pytest.raises(ValueError, match="word, number, uuid"):
        grammar.make_value(random.Random(0), "city")  # type: ignore[arg-type]


def test_several_values_match_in_any_order() -> None:
    assert grammar.join_list(["1", "2", "3"]) == "1, 2 and 3"
    assert grammar.exact_match("1234567, 7654321 and 1111111.", ["7654321", "1111111", "1234567"])
    assert not grammar.exact_match("12345678.", ["1234567"])


def test_test_keys_are_held_out_of_training() -> None:
    texts = Texts(nt.build_tokenizer(), seed=0, bank=100)
    used: set[str] = set()
    for stage in CURRICULUM:
        for _ in range(200):
            facts, questions, _ = texts._facts(stage.mix, 3, 2)
            used |= {key for key, _ in facts}
            assert not any(f" {key} " in q.prefix for q in questions for key in grammar.TEST_KEYS)
    assert set(grammar.TRAIN_KEYS) <= used
    assert not set(grammar.TEST_KEYS) & used
    assert not set(grammar.TEST_KEYS) & set(grammar.TRAIN_KEYS)


def test_tokenizer_round_trip_and_fallback(bundle: Bundle) -> None:
    tokenizer = bundle[1]
    for text in ("naïve \U0001f642\n\n  tab\tx-1 don't", nt.intro_text(), "UUID 3f2a-99 costs 12,345.67"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id is None


def test_tokenizer_equals_the_built_one(bundle: Bundle) -> None:
    built = nt.build_tokenizer()
    assert built.get_vocab() == bundle[1].get_vocab()
    text = " ".join(islice(grammar.filler_sentences(random.Random(5)), 30)) + " 12345 xyzé"
    assert built(text).input_ids == bundle[1](text).input_ids
    assert built.chat_template == bundle[1].chat_template


def test_every_grammar_word_and_digit_group_is_one_token(bundle: Bundle) -> None:
    tokenizer = bundle[1]
    for word in nt.vocabulary():
        assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1, word
    for group in ("7", "07", "042", "999"):
        assert len(tokenizer(group, add_special_tokens=False).input_ids) == 1
    assert tokenizer.tokenize(" 1234567.") == ["Ġ", "123", "456", "7", "."]


def test_encoding_sentence_by_sentence_equals_encoding_the_whole(bundle: Bundle) -> None:
    tokenizer, rng = bundle[1], random.Random(2)
    pieces = list(islice(grammar.filler_sentences(rng), 200))
    pieces += [grammar.needle_text("opal", grammar.make_value(rng)), grammar.question_text(["opal"])]
    pieces = [pieces[0]] + [" " + piece for piece in [*pieces[1:], grammar.answer_prefix(["opal"])]] + ["1234567."]
    joined = tokenizer("".join(pieces), add_special_tokens=False).input_ids
    assert joined == [i for piece in pieces for i in tokenizer(piece, add_special_tokens=False).input_ids]


@pytest.mark.parametrize("key", ["opal", "1234567"])
def test_question_fits_the_default_observation_window(bundle: Bundle, key: str) -> None:
    tail = f" {grammar.question_text([key])}<|assistant|>{grammar.answer_prefix([key])}"
    assert len(bundle[1](tail, add_special_tokens=False).input_ids) < 32


def test_chat_template(bundle: Bundle) -> None:
    tokenizer = bundle[1]
    turns = [{"role": "user", "content": "One."}, {"role": "assistant", "content": "Two."}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == "<|bos|><|user|>One.<|assistant|>Two.<|end|>"
    asked = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert asked == "<|bos|><|user|>One.<|assistant|>"


def test_files_are_small() -> None:
    files = list(needle_model_path().iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json", "train.log", "TRAINING.md"} <= {f.name for f in files}
    assert sum(f.stat().st_size for f in files) <= 4_000_000


@pytest.mark.parametrize(("length", "samples"), [(200, 22), (512, 22), (1024, 11)])
def test_dense_model_finds_the_needle(bundle: Bundle, length: int, samples: int) -> None:
    assert validate(*bundle, length, samples, seed=77) >= 0.95


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_copies_answer_through_generate(dtype: torch.dtype) -> None:
    model, tokenizer = load_needle_model(dtype)
    texts = Texts(tokenizer, seed=5, split="test", bank=2000)
    mix = Mix(needles=(4, 4), questions=(1, 1))
    for i in range(4):
        sample = texts.sample(1024, mix, depth=i / 3, chat=i % 2 == 0)
        prompt = torch.tensor(sample.ids[: sample.answer_start])[None]
        output = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12)
        assert grammar.exact_match(tokenizer.decode(output[0, prompt.shape[1] :]), sample.values)
        assert output[0, -1] == tokenizer.eos_token_id
