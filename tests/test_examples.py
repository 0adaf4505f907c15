"""The deployment files: their commands are those that exist, and name files that are there."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

from llm_accel import cli
from llm_accel.serve.metrics import Metrics
from llm_accel.serve.settings import ServeSettings

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "examples" / "deploy"


def settings_of(words: list[str]) -> ServeSettings:
    return ServeSettings.from_arguments(cli.parse(words)[1])


def test_the_container_starts_the_server_and_copies_what_its_build_needs() -> None:
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    (entry,) = re.findall(r"^ENTRYPOINT (.*)$", text, re.MULTILINE)
    (example,) = re.findall(r"llm-accel (--model .*)$", text, re.MULTILINE)
    settings = settings_of(json.loads(entry)[1:] + shlex.split(example))
    assert settings.host == "0.0.0.0" and f"EXPOSE {settings.port}" in text and f":{settings.port}/live" in text
    copied = [name for line in re.findall(r"^COPY (.*) /src\S*$", text, re.MULTILINE) for name in line.split()]
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (licence,) = re.findall(r'license-files = \["(.*)"\]', project)
    assert {"pyproject.toml", "README.md", licence, "llm_accel"} == set(copied)
    assert all((ROOT / name).exists() for name in copied)


def test_the_unit_waits_longer_than_the_server_drains() -> None:
    text = (DEPLOY / "llm-accel.service").read_text(encoding="utf-8")
    (start,) = re.findall(r"^ExecStart=(.*)$", text, re.MULTILINE)
    settings = settings_of(shlex.split(start)[1:])
    (patience,) = re.findall(r"^TimeoutStopSec=(\d+)$", text, re.MULTILINE)
    assert settings.drain_s < int(patience) and settings.api_key_file in text.split("[Unit]")[0]


def test_the_board_shows_metrics_that_the_server_has() -> None:
    board = json.loads((DEPLOY / "grafana.json").read_text(encoding="utf-8"))
    metrics = Metrics()
    source = (ROOT / "llm_accel" / "serve" / "engine.py").read_text(encoding="utf-8")
    for name in re.findall(r'\bwatch\("(\w+)"', source):
        metrics.watch(name, "a gauge of the engine", float)
    for labelled in ("requests", "held_bytes", "dense_bytes"):
        counter = getattr(metrics, labelled)
        counter.labels(*["x"] * len(counter._labelnames))
    known = {line.split("{")[0].split()[0] for line in metrics.text().decode().splitlines() if line[:1] != "#"}
    asked = set(re.findall(r"llm_accel_\w+", json.dumps(board["panels"])))
    assert len(asked) > 10 and asked <= known
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
