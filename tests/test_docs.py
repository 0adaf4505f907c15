"""What README and docs show is true: Python runs as it stands, commands parse, and no link leads nowhere.

A block of Python whose first line begins with ``# needs`` (a GPU, another package, ...) is compiled only.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel

import llm_accel
from llm_accel import cli, list_methods
from llm_accel.methods import catalog
from llm_accel.patches.compiled import call
from llm_accel.registry import parse_all
from tests.eval.needle_helpers import tiny_model as tiny_reader
from tests.eval.needle_helpers import tokenizer
from tests.pages import DOCS, ROOT, blocks
from tests.serve.kit import Running, start
from tests.tiny import tiny_model
from tests.tiny_vlm import CONFIGS, inputs

ADDRESS = "http://127.0.0.1:8000"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def shell_lines(page: Path) -> list[list[str]]:
    """The commands of a page as words, comments left out."""
    text = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


def pages_with(language: str) -> list[Path]:
    return [page for page in PAGES if blocks(page, language)]


@every_page
def test_links_lead_somewhere(page: Path):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


# --- Python ----------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods that examples register are gone after them."""
    monkeypatch.setattr(catalog, "_registered", dict(catalog._registered))


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    running = start(tiny_reader(), tokenizer(), max_new_tokens=4)
    yield running
    running.stop()


def language_model() -> dict[str, Any]:
    """What the examples call model and inputs; two turns of a conversation."""
    model = tiny_model("llama")
    first, second = ({"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in _turns())
    ids = torch.randint(5, 90, (2, 100), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    questions = {"context": first["input_ids"], "questions": [ids[:1, :7], ids[1:, :9]]}
    return {"model": model, "inputs": batch, "first": first, "second": second} | questions | batch


def _turns() -> list[torch.Tensor]:
    ids = torch.randint(5, 90, (1, 60), generator=torch.Generator().manual_seed(0))
    return [ids[:, :40], ids]


def vision_model() -> dict[str, Any]:
    """The same with an image, and samples for a calibration; deep enough for the layers that the examples name."""
    config = CONFIGS["llava"]()
    config.text_config.num_hidden_layers = 24
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForImageTextToText.from_config(config).eval()
    return {"model": model, "inputs": inputs(model), "samples": [inputs(model)] * 2}


@pytest.mark.parametrize("page", pages_with("python"), ids=lambda page: str(page.relative_to(ROOT)))
def test_python_runs(page: Path, server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(call, "backend", lambda: "eager")
    names = vision_model() if page.name == "vision.md" else language_model()
    names |= {"llm_accel": llm_accel, "name": "needle", "history": [{"role": "user", "content": "The dog"}]}
    for number, text in enumerate(blocks(page, "python")):
        code = compile(text.replace(ADDRESS, server.url), f"{page.name}, block {number}", "exec", 0, True)
        if not text.startswith("# needs "):
            exec(code, names)
            llm_accel.remove(names["model"])


def test_what_the_examples_print(capsys: pytest.CaptureFixture[str]):
    names = language_model()
    for page, says in (("index.md", "llm_accel snapkv"), ("guides/own_method.md", "71 stored of 107 seen")):
        for text in blocks(DOCS / page, "python"):
            exec(compile(text, page, "exec", 0, True), names)
        assert says in capsys.readouterr().out


def test_every_method_has_a_page():
    text = "".join(page.read_text(encoding="utf-8") for page in (DOCS / "methods").glob("*.md"))
    assert [name for name in list_methods() if f"<!-- options: {name} -->" not in text] == []


# --- commands --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", pages_with("bash"), ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_parse(page: Path):
    makefile, project = ((ROOT / name).read_text(encoding="utf-8") for name in ("Makefile", "pyproject.toml"))
    for words in shell_lines(page):
        ours = [place for place, word in enumerate(words) if word.rstrip(")") in ("llm-accel", "llm_accel")]
        if ours and words[0] != "pip":
            _, given = cli.parse(words[ours[0] + 1 :])
            specs = getattr(given, "methods", None) or getattr(given, "method", None) or []
            for spec in [specs] if isinstance(specs, str) else specs:
                assert spec == "oracle" or parse_all(spec) is not None
        elif words[:2] == ["python", "-m"]:
            found = importlib.util.find_spec(words[2])
            assert found and found.origin
            module = Path(found.origin)
            module = module.with_name("__main__.py") if module.name == "__init__.py" else module
            source = module.read_text(encoding="utf-8")
            end = words.index("--") if "--" in words else len(words)
            if load := words[end + 1 :]:  # for the load that is put on servers
                cli.parse(["bench", "serve", "--url", "http://127.0.0.1:8000/v1", *load])
            assert [word for word in words[:end] if word.startswith("--") and f'"{word}"' not in source] == []
        elif words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE)
        elif words[:2] == ["pip", "install"]:
            for extra in ",".join(re.findall(r"(?:^\.|llm_accel)\[(.*)\]", words[-1])).split(","):
                assert not extra or f"\n{extra} = [" in project


def test_the_curl_command_is_answered(server: Running):
    (words,) = [words for words in shell_lines(ROOT / "README.md") if words[0] == "curl"]
    body = json.loads(words[words.index("-d") + 1])
    path = next(word for word in words if word.startswith("http")).removeprefix(ADDRESS)
    assert server.post(path, body | {"max_tokens": 4}).status_code == 200
