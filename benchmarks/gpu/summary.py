"""A run in a few lines: what failed, and what was reached of the measured roofline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.gpu.journal import END, LINE

NOMINAL = {"bytes_per_second": 4.3e12, "flop_per_second": 7.9e14}  # of an H200, where its own could not be measured


def summarize(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Roofline, failures, what is left over, and the measured operations with their share of the roofline."""
    measured = {key: record[key] for record in records for key in NOMINAL if key in record}
    limits = NOMINAL | measured
    ended = [record for record in records if record["event"] == END and record.get("error")]
    of_cases = {record["item"] for record in ended if "case" in record}  # their items only count them
    failed = [_failure(record) for record in ended if "case" in record or record["item"] not in of_cases]
    operations = [_operation(record, limits) for record in records if record["event"] == LINE and "moved" in record]
    left_over = [name for record in records for name in record.get("left_over", ())]
    return {
        "roofline": limits | {"measured": sorted(measured)},
        "failed": failed,
        "left_over": left_over,
        "operations": operations,
        "lines": [*map(_line, operations), *(f"FAILED {failure}" for failure in failed)],
    }


def _failure(record: dict[str, Any]) -> str:
    case = f", {record['case']}" if "case" in record else ""
    return f"{record['item']}{case}: {record['error']}"


def _operation(record: dict[str, Any], limits: dict[str, float]) -> dict[str, Any]:
    bound = max(record["moved"] / limits["bytes_per_second"], record["flop"] / limits["flop_per_second"])
    return record | {"roofline_percent": 1e8 * bound / record["median_us"]}


def _line(record: dict[str, Any]) -> str:
    stages = "" if record["stages"] is None else f", {record['stages']} stages"
    name = f"{record['op']}: {record['problem']}{stages}"
    return f"{name:<84} {record['median_us']:10.1f} us {record['roofline_percent']:5.1f} % of roofline"
