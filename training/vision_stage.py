"""What a stage of the vision model's training is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from training.vision_data import Subject


@dataclass(frozen=True)
class Stage:
    """One step of the curriculum."""

    name: str
    steps: int
    batch: int
    lr: float
    mix: Mapping[Subject, int] = field(default_factory=dict)  # questions per scene
    dense: float = 0.25  # share of the steps on scenes of many things
    world: float = 0.0  # share of the scenes that are drawn in any style, not the package's
    grow: int = 0  # steps over which standard scenes grow from one thing to four
    tower: float = 1.0  # loss weight of the tower's own tasks; 0 freezes it
    tower_only: float = 0.0  # share of the steps without questions
    hide: float = 0.0  # share of images that lose a random share of their background
    inside: float = 0.0  # share of these that lose it inside the tower, not behind it
    broken: float = 0.0  # share of the things in these that lose patches of their own
    edges: float = 0.0  # share of these that keep background patches with an edge of a thing on them
    few: float = 0.0  # share of the images with gaps that keep 1 to 4 patches of each thing and nothing else
