"""The check of imports and paths finds what it is for, and nothing in the package."""

from __future__ import annotations

import pytest

from scripts.imports import climbs, cycles, main


def test_finds_cycles_of_any_length() -> None:
    imports = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a", "e"}, "e": {"d"}, "f": {"a"}, "g": set()}
    assert cycles(imports) == [["a", "b", "c"], ["d", "e"]]
    assert cycles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize(
    "path",
    [
        "Path(__file__).parents[1] / 'eval'",
        "Path(__file__).parent.parent / 'eval'",
        "Path(__file__).resolve().parent.parent",
        "Path(llm_accel.__file__).parents[0]",
    ],
)
def test_finds_paths_that_climb(path: str) -> None:
    assert list(climbs(f"here = 1\nthere = {path}\n")) == [2]


def test_a_file_may_look_beside_itself() -> None:
    assert not list(climbs("here = Path(__file__).parent / 'tasks'\nother = Path(name).parent.parent\n"))
    assert list(climbs("from importlib.resources import files\n")) == [1]


def test_the_package_has_neither(capsys: pytest.CaptureFixture[str]) -> None:
    assert main() == 0
    assert "0 cycles, 0 paths" in capsys.readouterr().out
