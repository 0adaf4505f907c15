"""What the commands that evaluate have in common: a directory that a later call continues, parts that several
processes do, and one of them that tells what came out."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedModel

from llm_accel.common.arguments import parse_shard
from llm_accel.common.environment import hardware, versions, weights_digest
from llm_accel.common.launch import Launch
from llm_accel.errors import ConfigError
from llm_accel.eval.plots import require_matplotlib
from llm_accel.eval.records import Record, RunDir


class EvalSettings(Protocol):
    """What tells one run from another."""

    @property
    def model(self) -> str | None:
        """Where the model comes from; None for the bundled one."""

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain data."""


@dataclass(frozen=True)
class Evaluation:
    """One call of a command.

    Attributes:
        command: its name.
        kind: its kind of directory.
        args: what was asked for; read here are ``out``, ``overwrite`` and ``json_only``.
        launch: this process among those of the call.
        shard: the part of the work that this process does.
    """

    command: str
    kind: type[RunDir]
    args: argparse.Namespace
    launch: Launch
    shard: tuple[int, int]

    @classmethod
    def begin(
        cls,
        command: str,
        kind: type[RunDir],
        args: argparse.Namespace,
        settings: EvalSettings,
        open_settings: Collection[str],
    ) -> Evaluation:
        """Checks what can be checked before a large model loads for minutes.

        Args:
            command: its name.
            kind: its kind of directory.
            args: what was asked for; ``shard`` and ``plot`` are read here.
            settings: as far as they are known by now.
            open_settings: names of those that model and data may still change.

        Raises:
            ConfigError: ``--shard`` with ``--overwrite``, no matplotlib for ``--plot``, another run in ``--out``.
        """
        shard, launch = parse_shard(args.shard), Launch.here()
        if args.overwrite and shard[1] > 1:
            raise ConfigError(
                "--overwrite with --shard would remove the records of the other shards; clear --out first."
            )
        if args.plot:
            require_matplotlib()
        if args.out and not args.overwrite:
            known = {key: value for key, value in settings.to_dict().items() if key not in open_settings}
            kind(Path(args.out)).check(known)
        return cls(command, kind, args, launch, launch.part(shard))

    def check_length(self, model: PreTrainedModel, longest: int) -> int | None:
        """The length that a model was made for, None if unknown; says so where ``longest`` goes beyond."""
        trained: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if trained is not None and longest > trained:
            self.launch.say(f"warning: the model was made for {trained} tokens, prompts and answers go to {longest}")
        return trained

    def open(
        self, settings: EvalSettings, prompt_hash: str, model: PreTrainedModel, **about: Any
    ) -> tuple[RunDir, list[Record]]:
        """The directory, new or continued, and the records in it. Without ``--out`` its name is
        ``runs/<command>-<model>-<hash of settings, prompts and weights>``: the same call continues its own run.

        Args:
            settings: with everything resolved.
            prompt_hash: hash over the prompts.
            model: what answers them.
            about: what else run.json should tell.
        """
        tied = settings.to_dict() | {"prompt_hash": prompt_hash, "weights_hash": weights_digest(model)}
        about = {
            "command": self.command,
            "versions": versions(),
            "hardware": hardware(model.device),
            **about,
            "argv": sys.argv[1:],
        }
        run_dir = self.kind(Path(self.args.out) if self.args.out else self._default_out(settings, tied))
        overwrite = self.args.overwrite and self.launch.first
        done = self.launch.first_then_all(lambda: run_dir.open(tied, about, overwrite=overwrite))
        self.launch.say(f"results go to {run_dir.path}")
        for name in ("versions", "hardware"):
            if done and run_dir.about().get(name) != about[name]:
                self.launch.say(
                    f"warning: the records there were made with other {name} (see run.json); times may not compare"
                )
        return run_dir, done

    def _default_out(self, settings: EvalSettings, tied: dict[str, Any]) -> Path:
        name = Path(settings.model).name if settings.model else "bundled"
        digest = hashlib.sha256(json.dumps(tied, sort_keys=True).encode()).hexdigest()[:8]
        return Path("runs") / f"{self.command}-{name}-{digest}"

    def conclude(
        self,
        work: Callable[[], None],
        finish: Callable[[], dict[str, Any]],
        render: Callable[[dict[str, Any]], str],
    ) -> dict[str, Any]:
        """Does the work of this process. The first process then writes the summary of what all have done, even after
        an interruption, prints it as ``render`` shows it and, on the last line of stdout, as JSON.

        Returns:
            The summary; empty in the other processes.
        """
        summary: dict[str, Any] = {}
        try:
            work()
            self.launch.meet()
        finally:
            if self.launch.first:
                summary = finish()
        if self.launch.first:
            if not self.args.json_only:
                print(render(summary))
            print(json.dumps(summary, separators=(",", ":")), flush=True)
        return summary
