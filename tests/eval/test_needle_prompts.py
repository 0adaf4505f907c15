"""Prompts have exactly the length asked for, needles stand where they should, nothing is encoded twice."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_accel import ConfigError
from llm_accel.eval.grid import GridPoint
from llm_accel.eval.prompts import grammar
from llm_accel.eval.prompts.encoding import PLACEHOLDER, Encoder, make_frame
from llm_accel.eval.prompts.needles import NeedleBuilder
from llm_accel.eval.tasks.needle.settings import TASKS, NeedleSettings
from tests.eval.needle_helpers import haystack, make_maker, tokenizer

KINDS = ("bundled", "spaces", "joined")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chat", [True, False])
def test_lengths_are_exact_and_needles_are_whole(kind, chat, task):
    needles = 1 if task == "single" else 3
    for key_kind, value_kind in itertools.product(grammar.KEY_KINDS, grammar.KEY_KINDS):
        maker = make_maker(
            kind,
            task=task,
            needles=needles,
            distractors=2,
            key_kind=key_kind,
            value_kind=value_kind,
            chat_template=chat,
        )
        for length, depth in ((1531, 0.0), (2048, 37.5), (1800, 100.0)):
            prompt = maker.make(GridPoint(length, depth, 0))
            assert len(prompt.ids) == length
            text = maker.encoder.tokenizer.decode(prompt.ids)
            assert len(prompt.expected) == (1 if task in ("single", "multikey") else needles)
            for start, value in zip(prompt.needles, prompt.expected, strict=True):
                sentence = maker.encoder.decode(prompt.ids[start : start + 200])
                assert sentence.lstrip().startswith("One of the special magic")
                assert value in sentence.split("One of the special magic")[1]
                before = maker.encoder.tokenizer.decode(prompt.ids[:start])
                first = before == maker.encoder.tokenizer.decode(maker.frame.prefix)
                assert before.endswith(".") or (first and depth == 0)
            assert len(prompt.others) == (2 if task != "multikey" else 4)
            assert text.count("One of the special magic") >= needles + 2


@given(
    length=st.integers(220, 3000), depth=st.floats(0, 100), sample=st.integers(0, 50), seed=st.integers(0, 9),
    needles=st.integers(2, 8), prefix=st.booleans(), chat=st.booleans(),
)  # fmt: skip
def test_any_length_is_exact(length, depth, sample, seed, needles, prefix, chat):
    maker = make_maker(needles=needles, seed=seed, answer_prefix=prefix, chat_template=chat)
    prompt = maker.make(GridPoint(length, depth, sample))
    assert len(prompt.ids) == length
    assert 0 < prompt.context_length < length
    assert prompt == maker.make(GridPoint(length, depth, sample))


def test_depth_is_the_share_of_haystack_before_the_needle():
    maker = make_maker()
    for depth in range(0, 101, 10):
        for sample in range(5):
            prompt = maker.make(GridPoint(4096, depth, sample))
            before = prompt.needles[0]
            before -= 21 * sum(start < prompt.needles[0] for start in prompt.others)  # about a needle's length
            assert before / prompt.context_length == pytest.approx(depth / 100, abs=0.02)


def test_first_and_last_depth_are_the_outermost_places():
    maker = make_maker()
    for sample in range(20):
        first, last = maker.make(GridPoint(1024, 0, sample)), maker.make(GridPoint(1024, 100, sample))
        assert first.needles[0] < 30
        assert all(start > first.needles[0] for start in first.others)
        assert all(start < last.needles[0] for start in last.others)
        sentence = maker.encoder.decode(last.ids[last.needles[0] : last.context_length])
        assert sentence == f" {grammar.needle_text('x', last.expected[0])}".replace(
            "for x", sentence.split(" is:")[0][-9:]
        ) or (sentence.endswith(f"{last.expected[0]}."))


def test_further_asked_needles_are_spread_over_what_is_left():
    prompt = make_maker(task="multiquery", needles=4).make(GridPoint(4096, 20, 0))
    shares = [start / prompt.context_length for start in prompt.needles]
    assert shares == pytest.approx([0.2, 0.4, 0.6, 0.8], abs=0.03)


def test_prompts_differ_by_place_and_seed_and_not_by_order():
    maker, other = make_maker(), make_maker(seed=1)
    places = [(512, 0.0, 0), (512, 0.0, 1), (512, 50.0, 0), (1024, 0.0, 0)]
    hashes = [maker.make(GridPoint(*place)).digest() for place in places]
    assert len(set(hashes)) == len(places)
    assert [maker.make(GridPoint(*place)).digest() for place in reversed(places)] == hashes[::-1]
    assert other.make(GridPoint(*places[0])).digest() != hashes[0]


def test_the_question_is_what_a_query_agnostic_context_lacks():
    maker = make_maker(chat_template=True)
    prompt = maker.make(GridPoint(700, 40, 0))
    context, rest = prompt.ids[: prompt.context_length], prompt.ids[prompt.context_length :]
    decode = maker.encoder.tokenizer.decode
    assert "What is" not in decode(context) and decode(context).startswith("<|bos|><|user|>")
    question, answer = decode(rest).split("<|assistant|>")
    assert question.startswith(" What is the special magic number for ") and question.endswith("text?")
    assert answer.startswith("The special magic number for ") and answer.endswith(" is: ")


def test_bundled_prompt_equals_the_joined_text_encoded_at_once():
    maker = make_maker(chat_template=False)
    prompt = maker.make(GridPoint(600, 50, 3))
    text = maker.encoder.decode(prompt.ids)
    assert maker.encoder.tokenizer.encode(text) == list(prompt.ids)


def test_too_short_a_length_names_what_is_needed():
    maker = make_maker(needles=8)
    with pytest.raises(ConfigError, match=r"--lengths 64: .* at least (\d+)") as error:
        maker.make(GridPoint(64, 0, 0))
    least = int(str(error.value).split("at least ")[1].rstrip("."))
    assert len(maker.make(GridPoint(least, 0, 0)).ids) == least
    with pytest.raises(ConfigError):
        maker.make(GridPoint(least - 1, 0, 0))


@pytest.mark.parametrize("value_kind", grammar.KEY_KINDS)
@pytest.mark.parametrize("key_kind", grammar.KEY_KINDS)
@pytest.mark.parametrize("task", TASKS)
def test_keys_and_values_are_all_different(task, key_kind, value_kind):
    settings = NeedleSettings(
        task=task, needles=1 if task == "single" else 5, distractors=6, key_kind=key_kind, value_kind=value_kind
    )
    builder = NeedleBuilder(settings.hidden, "bundled", Encoder(tokenizer()), haystack("bundled", "grammar"))
    for seed in range(40):
        template = builder.draw_at(random.Random(seed), 50.0)
        sentences = [builder.encoder.decode(ids).strip() for ids in template.asked + template.others]
        assert len(set(sentences)) == len(sentences) == settings.needles + 6
        keys = [sentence.split(" for ")[1].split(" is: ")[0] for sentence in sentences]
        values = [sentence.split(" is: ")[1].rstrip(".") for sentence in sentences]
        assert len(set(values)) == len(values)
        assert len(set(keys)) == (7 if task == "multivalue" else len(keys))
        assert set(values[: len(template.asked)]) == set(template.answers)
        assert all(key in template.question for key in keys[: len(template.asked)])
        assert not any(f" {key}" in template.question for key in keys[len(template.asked) :])


def test_pools_too_small_are_refused():
    with pytest.raises(ConfigError, match="--key-kind number"):
        NeedleSettings(needles=40)
    with pytest.raises(ConfigError, match="--value-kind number"):
        NeedleSettings(needles=2, distractors=60, key_kind="number", value_kind="word")


def test_spaces_of_the_tokenizer_are_not_doubled():
    for kind in KINDS:
        encoder = Encoder(tokenizer(kind))
        joined = encoder.start("It was 1.") + encoder.continuation("The dog watched it.")
        assert encoder.decode(joined).strip() == "It was 1. The dog watched it."


def test_answer_prefix_keeps_its_space_only_where_digits_stand_apart():
    ends = {}
    for kind in KINDS:
        encoder = Encoder(tokenizer(kind))
        prefix = encoder.answer_prefix("The number is: ", begins=True)
        ends[kind] = encoder.tokenizer.convert_ids_to_tokens(prefix)[-1]
    assert ends["bundled"] == "Ġ"
    assert ends["joined"].endswith(":")  # " 123" is a token: the model writes the space itself


def test_frame_without_template_is_bos_alone():
    encoder = Encoder(tokenizer())
    frame = make_frame(encoder, chat_template=False)
    assert frame.prefix == (encoder.tokenizer.bos_token_id,) and frame.suffix == () and not frame.chat


class _Template:
    """A tokenizer that only has a chat template."""

    def __init__(self, rendered: str) -> None:
        self.chat_template, self.rendered = "{{ x }}", rendered

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(c) for c in text]

    def apply_chat_template(self, *args: object, **kwargs: object) -> str:
        if self.rendered == "raise":
            raise ValueError("no user turns here")
        return self.rendered


@pytest.mark.parametrize("rendered", ["", f"{PLACEHOLDER} and {PLACEHOLDER}", "raise"])
def test_templates_that_cannot_be_split_are_refused(rendered):
    with pytest.raises(ConfigError, match="--no-chat-template"):
        make_frame(Encoder(_Template(rendered)), chat_template=None)


def test_chat_template_asked_for_and_missing():
    plain = _Template("")
    plain.chat_template = None
    with pytest.raises(ConfigError, match="has no chat template"):
        make_frame(Encoder(plain), chat_template=True)
    assert make_frame(Encoder(plain), chat_template=None).chat is False
