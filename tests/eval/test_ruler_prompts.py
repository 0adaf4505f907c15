"""RULER's prompts have exactly the length asked for, and the text holds what is asked about."""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import cache

import pytest

from llm_accel import ConfigError
from llm_accel.eval.grid import GridPoint
from llm_accel.eval.prompts.encoding import Encoder, make_frame
from llm_accel.eval.prompts.words import SINGLE, word_pair
from llm_accel.eval.tasks.ruler.documents import load_questions
from llm_accel.eval.tasks.ruler.settings import RulerSettings, parse_tasks
from llm_accel.eval.tasks.ruler.task import RulerMaker, RulerTask
from llm_accel.eval.tasks.ruler.tasks import BUNDLED, TASKS, WITHOUT_DATA
from tests.eval.needle_helpers import haystack, tiny_model, tokenizer

ROWS = [
    {"question": f"Who made {i}?", "answers": [f"maker {i}"], "documents": [f"It was maker {i} who made {i}. " * 5]}
    for i in range(20)
]


@cache
def make_maker(kind: str = "bundled", chat: bool = True, **options) -> RulerMaker:
    options = {"tasks": WITHOUT_DATA, "wording": "ruler", **options}
    encoder = Encoder(tokenizer(kind))
    return RulerMaker(encoder, make_frame(encoder, chat), haystack(kind, "grammar"), RulerSettings(**options))


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    path = tmp_path_factory.mktemp("qa") / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return str(path)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kind", ["bundled", "spaces", "joined"])
def test_prompt_and_answer_fill_the_length_exactly(kind, task, questions):
    for chat, length in ((True, 2048), (False, 3001)):
        maker = make_maker(kind, chat, tasks=(task,), qa_1=questions, qa_2=questions)
        prompt = maker.make(GridPoint(length, task, 3))
        assert len(prompt.ids) + TASKS[task].new_tokens == length
        assert prompt == maker.make(GridPoint(length, task, 3)) != maker.make(GridPoint(length, task, 4))
        context = maker.encoder.decode(prompt.ids[: prompt.context_length])  # "spaces" has no token for a newline
        assert any(answer in context for answer in prompt.expected) and (context.endswith("\n") or kind == "spaces")


@pytest.mark.parametrize("task", TASKS)
def test_the_bundled_tokenizer_reads_the_text_as_the_same_tokens(task, questions):
    for wording in ("ruler", "bundled"):
        maker = make_maker(tasks=(task,), wording=wording, qa_1=questions, qa_2=questions)
        prompt = maker.make(GridPoint(2048, task, 0))
        assert maker.encoder.start(maker.encoder.tokenizer.decode(prompt.ids)) == list(prompt.ids)


@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if task.family == "niah"])
@pytest.mark.parametrize("wording", ["ruler", "bundled"])
def test_needles_are_whole_and_keys_are_asked_for_once(task, wording):
    maker, spec = make_maker(wording=wording), TASKS[task].needles
    for sample in range(2):
        prompt = maker.make(GridPoint(1531, task, sample))
        context, tail = (
            maker.encoder.decode(part)
            for part in (prompt.ids[: prompt.context_length], prompt.ids[prompt.context_length :])
        )
        found = re.findall(r"One of the special magic \w+ for (\S+) is: ([\w-]+)\.", context)
        asked = [value for key, value in found if key in tail]
        assert sorted(asked) == sorted(prompt.expected)
        assert len(prompt.expected) == spec.values * spec.queries
        if spec.hay != "needles":
            assert len(found) == spec.keys * spec.values
        several = spec.values * spec.queries > 1
        assert ("What are all the special magic" in tail) == several != ("What is the special magic" in tail)


def test_chains_lead_from_the_value_to_every_name():
    prompt = make_maker().make(GridPoint(3000, "vt", 0))
    text = make_maker().encoder.decode(prompt.ids)
    value = re.findall(r"assigned the value (\d+)", text)[-1]
    names = re.findall(rf"VAR (\w+) = {value}\n", text)
    assigned = {source: name for name, source in re.findall(r"VAR (\w+) = VAR (\w+)\n", text)}
    while names[-1] in assigned:
        names.append(assigned[names[-1]])
    assert tuple(names) == prompt.expected and len(names) == 5
    assert text.index("they are: ") < text.index(f"VAR {names[0]}")  # the solved example comes first


@pytest.mark.parametrize("length", [2048, 8192])
def test_common_words_are_the_ten_that_stand_most_often(length):
    maker = make_maker()
    prompt = maker.make(GridPoint(length, "cwe", 0))
    listed = maker.encoder.decode(prompt.ids).split("Memorize the ones that appear most often.")[-1]
    counts = Counter(re.findall(r"\d+\. ([a-z-]+)", listed.split("Question")[0]))
    top = counts.most_common(11)
    assert {word for word, _ in top[:10]} == set(prompt.expected)
    often, seldom = (30, 3) if length >= 4096 else (6, 1)
    assert often - 3 <= top[9][1] <= top[0][1] == often and top[10][1] == seldom


def test_frequent_words_are_the_three_behind_the_dots():
    maker = make_maker()
    prompt = maker.make(GridPoint(4096, "fwe", 0))
    context = maker.encoder.decode(prompt.ids[: prompt.context_length]).split("coded words.")[-1]
    (dots, _), *top = Counter(context.split()).most_common(4)
    assert dots == "..." and tuple(word for word, _ in top) == prompt.expected


def test_documents_that_hold_the_answer_stay_whole(questions):
    maker = make_maker(tasks=("qa_1",), qa_1=questions)
    for sample in range(25):  # more than there are questions
        prompt = maker.make(GridPoint(2048, "qa_1", sample))
        row = ROWS[sample % len(ROWS)]
        text = maker.encoder.decode(prompt.ids)
        assert row["documents"][0] in text and prompt.expected == tuple(row["answers"])
        numbers = [int(n) for n in re.findall(r"Document (\d+):", text)]
        assert numbers == list(range(numbers[0], numbers[-1] + 1)) and numbers[0] in (1, 2)


def test_squad_and_hotpot_rows_are_read(tmp_path):
    squad = {"data": [{"title": "T", "paragraphs": [
        {"context": "A one.", "qas": [{"question": "one?", "answers": [{"text": "A"}, {"text": "a"}]}]},
        {"context": "B two.", "qas": [{"question": "two?", "answers": [], "is_impossible": True}]}]}]}  # fmt: skip
    hotpot = [{"question": "q?", "answer": "yes", "context": [["X", ["s1. ", "s2."]], ["Y", ["s3."]]]},
              {"question": "r?", "answer": "no", "context": {"title": ["Z"], "sentences": [["s4."]]}}]  # fmt: skip
    encoder = Encoder(tokenizer())
    for name, data in (("squad.json", squad), ("hotpot.json", hotpot)):
        (tmp_path / name).write_text(json.dumps(data))
    built = load_questions(str(tmp_path / "squad.json"), "--qa-1", encoder)
    (question,) = built.questions
    assert question.answers == ("A", "a") and built.documents == ("A one.", "B two.")
    assert (question.documents, question.more) == ((0,), (1,))
    built = load_questions(str(tmp_path / "hotpot.json"), "--qa-2", encoder)
    assert built.documents == ("X\ns1. s2.", "Y\ns3.", "Z\ns4.") and built.questions[1].documents == (2,)
    (tmp_path / "bad.jsonl").write_text('{"question": "q"}\n')
    with pytest.raises(ConfigError, match=r"--qa-1 .*row 0.*SQuAD"):
        load_questions(str(tmp_path / "bad.jsonl"), "--qa-1", encoder)


def test_no_word_contains_another_one():
    assert len(SINGLE) > 300
    assert not [(a, b) for a in SINGLE for b in SINGLE if a != b and a in b]
    assert len({word_pair(i) for i in range(2000)}) == 2000


def test_scores_are_rulers():
    assert TASKS["vt"].score("they are ab, CD.", ("AB", "CD", "EF", "GH")) == 0.5
    assert TASKS["qa_1"].score("It was Rome", ("paris", "rome")) == 1.0 and TASKS["qa_2"].score("x", ("y",)) == 0.0


def test_places_and_batches():
    maker = make_maker(lengths=(1024, 2048), tasks=("vt", "niah_single_1"), samples=5, batch_size=3)
    task = RulerTask(tiny_model(), tokenizer(), maker)
    every = list(task.items())
    assert sorted(every) == every and len(every) == 20
    rows = list(task.batches(reversed(every)))
    assert [place for row in rows for place in row] == every
    assert all(len({(place.length, place.row) for place in row}) == 1 and len(row) <= 3 for row in rows)


def test_tasks_by_name():
    assert RulerSettings().tasks == BUNDLED and RulerSettings(tasks=("all",)).tasks == WITHOUT_DATA
    assert RulerSettings(model="x", qa_2="file.json").tasks == (*WITHOUT_DATA, "qa_2")
    assert (RulerSettings().wording, RulerSettings(model="x").wording) == ("bundled", "ruler")
    assert parse_tasks("vt, niah_single_1") == ("niah_single_1", "vt") and parse_tasks("all") == ("all",)
    with pytest.raises(ConfigError, match="niah_single_1"):
        parse_tasks("niah_singel_1")
    with pytest.raises(ConfigError, match="--qa-1"):
        RulerSettings(tasks=("qa_1",))


def test_a_length_without_room_names_a_longer_one():
    for task in WITHOUT_DATA:
        with pytest.raises(ConfigError, match=rf"--lengths 160: {task} needs more; give at least (\d+)"):
            make_maker().make(GridPoint(160, task, 0))


def test_needles_stand_at_all_depths():
    maker = make_maker(wording="bundled")
    shares = []
    for sample in range(40):
        prompt = maker.make(GridPoint(2048, "niah_single_2", sample))
        text = maker.encoder.decode(prompt.ids)
        shares.append(text.index("One of the special magic") / len(text))
    assert min(shares) < 0.1 and max(shares) > 0.9
    assert abs(sum(shares) / len(shares) - 0.5) < 0.15 and len(set(shares)) > 20
