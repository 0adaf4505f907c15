"""Settings for all tests: nothing reaches for a network, and property tests draw the same examples in every run."""

from __future__ import annotations

import os
import zlib

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")

settings.register_profile("repeatable", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--share",
        type=int,
        default=1,
        metavar="N",
        help="run one in N cases of parametrised tests, always the same",
    )
    parser.addoption("--turn", type=int, default=0, metavar="K", help="which of the N shares runs")


def pytest_report_header(config: pytest.Config) -> str | None:
    share = config.getoption("--share")
    return None if share == 1 else f"one in {share} cases: --share {share} --turn {config.getoption('--turn') % share}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    share = config.getoption("--share")
    turn = config.getoption("--turn") % share
    left = [item for item in items if "[" in item.name and zlib.crc32(item.nodeid.encode()) % share != turn]
    if left:
        config.hook.pytest_deselected(items=left)
        dropped = set(left)
        items[:] = [item for item in items if item not in dropped]
