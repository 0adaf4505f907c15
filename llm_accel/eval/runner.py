"""Runs all evaluations: a directory that a later call resumes, work shared by several processes, every method on the
same prompts, each record written at once, and one process that prints the summary."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from llm_accel.common.environment import hardware, versions, weights_digest
from llm_accel.common.launch import DistributedRun
from llm_accel.common.options import Options
from llm_accel.common.progress import RunProgress
from llm_accel.errors import ConfigError
from llm_accel.eval.plots import require_matplotlib
from llm_accel.eval.records import Record, RunDir
from llm_accel.eval.task import RunOptions, Task

AnyTask = Task[Any, Any, Any]
SettingsT = TypeVar("SettingsT", bound=Options)
Log = Callable[[str], None]


def run(
    kind: type[AnyTask], load: Callable[[SettingsT], AnyTask], settings: SettingsT, how: RunOptions
) -> dict[str, Any]:
    """Runs a task, prints its tables, and the summary as the last line of stdout. Of several processes each does its
    part; the first one writes the summary of what all have done, even after an interruption, and prints it.

    Args:
        load: the task of these settings, with its model; what can be checked is checked before this takes minutes.

    Returns:
        The summary; empty in the other processes.

    Raises:
        LlmAccelError: anything wrong with the options, before anything is run or written.
    """
    processes = DistributedRun.here()
    check(kind, settings, how)
    task = load(settings)
    for configs in filter(None, task.configs.values()):
        task.engine.try_method(configs)
    for warning in task.warnings():
        processes.log(f"warning: {warning}")
    run_dir, done = open_directory(task, how, processes)
    summary: dict[str, Any] = {}
    try:
        run_items(task, run_dir, done, processes.part(how.shard), processes.log, processes.first)
        processes.barrier()
    finally:
        if processes.first:
            summary = write_results(task, run_dir, how.plot)
    if processes.first:
        print_summary(summary, None if how.json_only else task.render(summary))
    return summary


def check(kind: type[AnyTask], settings: Options, how: RunOptions) -> None:
    """Raises :class:`ConfigError` for ``--shard`` with ``--overwrite``, for pictures without matplotlib, and for
    another run in ``--out``."""
    if how.overwrite and how.shard[1] > 1:
        raise ConfigError("--overwrite with --shard would remove the records of the other shards; clear --out first.")
    if how.plot:
        require_matplotlib()
    if how.out and not how.overwrite:
        known = {key: value for key, value in settings.to_dict().items() if key not in kind.open_settings}
        RunDir(Path(how.out), kind.fields).check(known)


def open_directory(task: AnyTask, how: RunOptions, processes: DistributedRun) -> tuple[RunDir, list[Record]]:
    """The directory, new or continued, and the records in it. Without ``--out`` its name is
    ``runs/<command>-<model>-<hash of settings, prompts and weights>``: the same call continues its own run."""
    tied = task.settings.to_dict() | {"prompt_hash": task.digest(), "weights_hash": weights_digest(task.model)}
    where = {"versions": versions(), "hardware": hardware(task.model.device)}
    about = {"command": task.command, **where, **task.about(), "argv": sys.argv[1:]}
    run_dir = RunDir(Path(how.out) if how.out else _default_out(task, tied), task.fields, task.plots)
    overwrite = how.overwrite and processes.first
    done = processes.first_then_all(lambda: run_dir.open(tied, about, overwrite=overwrite))
    processes.log(f"results go to {run_dir.path}")
    for name in where:
        if done and run_dir.about().get(name) != where[name]:
            processes.log(
                f"warning: earlier records were made with other {name} (see run.json); times may not be comparable"
            )
    return run_dir, done


def _default_out(task: AnyTask, tied: dict[str, Any]) -> Path:
    name = Path(task.settings.model).name if task.settings.model else "bundled"
    digest = hashlib.sha256(json.dumps(tied, sort_keys=True).encode()).hexdigest()[:8]
    return Path("runs") / f"{task.command}-{name}-{digest}"


def run_items(
    task: AnyTask,
    run_dir: RunDir,
    done: Sequence[Record],
    shard: tuple[int, int] = (1, 1),
    log: Log = lambda text: print(text, file=sys.stderr),
    shown: bool = True,
) -> None:
    """Runs the part of a shard that ``done`` lacks, every method on the same prompts, and appends to the directory.
    Shards are disjoint, cover the run and have equal shares of its cheap and its costly items."""
    known = {run_dir.key(record) for record in done}
    lacking = lacking_methods(task, task.items()[shard[0] - 1 :: shard[1]], known)
    if done:
        log(f"{run_dir.path}: {len(done)} records found, {sum(map(len, lacking.values()))} to do")
    if not lacking:
        return
    if (announced := task.announce(lacking)) is not None:
        log(announced)
    total = sum(task.size(item) * len(methods) for item, methods in lacking.items())
    with RunProgress(total, done, task.unit, shown, task.score) as progress:
        for batch in task.batches(lacking):
            prompts = [prompt for item in batch for prompt in task.prompts(item)]
            for method in task.configs:
                own = [prompt for prompt in prompts if (method, *prompt.key) not in known]
                records = run_prompts(task, run_dir, method, own, f"{shard[0]}/{shard[1]}")
                progress.add(records, sum(task.size(item) for item in batch if method in lacking[item]))


def lacking_methods(task: AnyTask, items: Iterable[Any], known: Collection[Any]) -> dict[Any, list[str]]:
    """Items with the methods that lack a record of a prompt there; items that lack nothing are left out."""
    lacking = {}
    for item in items:
        keys = list(task.keys(item)) if known else []
        lacking[item] = [m for m in task.configs if not known or any((m, *key) not in known for key in keys)]
    return {item: methods for item, methods in lacking.items() if methods}


def run_prompts(task: AnyTask, run_dir: RunDir, method: str, prompts: Sequence[Any], shard: str) -> list[Record]:
    """Answers the prompts of a batch with one method and appends a record of each to the directory."""
    configs, records = task.configs[method], []
    for call in task.calls(prompts, configs) if prompts else ():
        outcome = task.answer(call, configs)
        written = [{"method": method, **task.record(p, row, outcome), "shard": shard} for row, p in enumerate(call)]
        run_dir.append(written)
        records += written
    return records


def write_results(task: AnyTask, run_dir: RunDir, plot: bool) -> dict[str, Any]:
    """Writes summary.json and the pictures from all records in the directory."""
    records = run_dir.records()
    summary = task.summarize(records, command=task.command, model=task.name, out=str(run_dir.path))
    run_dir.write_summary(summary)
    if plot:
        task.draw(summary, records, run_dir.path)
    return summary


def print_summary(summary: dict[str, Any], table: str | None) -> None:
    """Prints the table, if any, and the summary as one line of JSON, the last one of stdout."""
    if table is not None:
        print(table)
    print(json.dumps(summary, separators=(",", ":")), flush=True)
