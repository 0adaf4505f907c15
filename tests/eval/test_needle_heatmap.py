"""The heat map is a PNG with one panel per method on one scale."""

from __future__ import annotations

import sys

import pytest
from PIL import Image

from llm_accel import ConfigError
from llm_accel.eval.heatmap import PALETTES, Panel, draw
from llm_accel.eval.plots import require_matplotlib, save

LENGTHS, DEPTHS = (512, 1024, 2048), (0.0, 50.0, 100.0)


def _panels(count: int) -> list[Panel]:
    cells = [[0.0, 0.5, 1.0], [1.0, 1.0, None], [0.0, 0.0, 0.25]]
    return [Panel(f"snapkv:budget={2**i},window=32,kernel=7,pool=max", cells, 0.531) for i in range(count)]


@pytest.mark.parametrize("palette", PALETTES)
@pytest.mark.parametrize("count", [1, 4, 5])
def test_one_panel_per_method_on_one_scale(tmp_path, palette, count):
    figure = draw(_panels(count), LENGTHS, DEPTHS, "title", "subtitle", palette=palette)
    panels = [axes for axes in figure.axes if axes.images]
    assert len(panels) == count and len(figure.axes) == count + 1
    assert all(axes.images[0].get_clim() == (0, 1) for axes in panels)
    assert all(axes.get_title(loc="right") == "0.531" for axes in panels)
    assert [text.get_text() for text in panels[0].get_xticklabels()] == ["512", "1k", "2k"]
    assert panels[0].images[0].get_array().shape == (3, 3)
    save(tmp_path / "map.png", figure)
    with Image.open(tmp_path / "map.png") as image:
        assert image.format == "PNG" and image.width > 400
        image.verify()


def test_the_classic_colours_are_at_the_ends_and_in_the_middle(tmp_path):
    panel = Panel("dense", [[0.0, 0.5, 1.0]], 0.5)
    figure = draw([panel], LENGTHS, (50.0,), "title")
    shown = figure.axes[0].images[0].to_rgba(figure.axes[0].images[0].get_array(), bytes=True)[0, :, :3]
    wanted = [[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in PALETTES["classic"]]
    assert abs(shown.astype(int) - wanted).max() <= 2


def test_a_line_stands_where_training_ended():
    (axes, _bar) = draw(_panels(1), LENGTHS, DEPTHS, "title", trained_length=1024).axes
    assert [line.get_xdata()[0] for line in axes.lines] == [1.5]
    for beyond in (None, 4096, 100):
        assert not draw(_panels(1), LENGTHS, DEPTHS, "title", trained_length=beyond).axes[0].lines


def test_method_names_stay_short():
    cells: list[list[float | None]] = [[1.0, 1.0, 1.0]] * 3
    names = ("dense", "streaming_llm:budget=128", "snapkv:budget=1024,window=32,kernel=13,pool=max,skip_layers=0+1+2")
    figure = draw([Panel(name, cells, 1.0) for name in names], LENGTHS, DEPTHS, "title")
    shown = [axes.get_title(loc="left") for axes in figure.axes[:3]]
    assert shown[:2] == list(names[:2])
    assert shown[2].startswith("snapkv: budget=1024,\n") and shown[2].count("\n") == 2 and shown[2].endswith(" ...")


def test_long_names_are_told_apart():
    names = [f"retrieval_heads:mode=mask,control={control}" for control in ("random", "random_excluding_circuit")]
    figure = draw([Panel(name, [[1.0] * 3] * 3, 1.0) for name in names], LENGTHS, DEPTHS, "title")
    shown = [axes.get_title(loc="left").replace("\n", "").replace(" ", "") for axes in figure.axes[:2]]
    assert shown == names


def test_large_grids_and_long_titles_stay_inside(tmp_path):
    lengths, depths = [1024 * i for i in range(1, 41)], [100 * i / 34 for i in range(35)]
    cells: list[list[float | None]] = [[0.5] * 40 for _ in depths]
    figure = draw([Panel("dense", cells, 0.5)] * 3, lengths, depths, "word " * 60)
    assert figure.get_size_inches()[0] < 18
    assert len(figure.axes[0].get_xticklabels()) <= 16
    save(tmp_path / "map.png", figure)


def test_without_matplotlib_the_message_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match="--no-plot"):
        require_matplotlib()
