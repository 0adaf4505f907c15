"""``llm-accel transformers-serve``: HuggingFace's own ``transformers serve``, every model that it loads accelerated.

Its requests run one after the other with batch 1; :mod:`llm_accel.serve.command` is the server with batches.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llm_accel.api import apply
from llm_accel.errors import ConfigError, UnsupportedCallError
from llm_accel.methods import MethodConfig
from llm_accel.registry import parse_all

_NEEDS = ("fastapi", "openai", "pydantic", "rich", "typer", "uvicorn")
_REFUSED = {  # parameter of transformers' Serve: why
    "continuous_batching": "its paged cache counts tokens seen, so nothing would be freed",
    "compile": "it asks for transformers' static cache, which stores every token",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The methods, and all that ``transformers serve`` takes."""
    parser.add_argument(
        "--method", required=True, metavar="NAME[:OPTION=...]", help="method on every model that is loaded"
    )
    parser.add_argument(
        "arguments",
        nargs=argparse.REMAINDER,
        metavar="MODEL ...",
        help="what 'transformers serve' takes, the model first or all of it behind '--' ('-- --help' lists it)",
    )


def run(args: argparse.Namespace) -> None:
    """Serves until a signal.

    Raises:
        LlmAccelError: an unknown method, one that the model does not take, or an option that undoes it.
    """
    methods = parse_all(args.method)
    missing = [name for name in _NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"transformers serve needs {', '.join(missing)}: pip install 'transformers[serving]'")
    import typer

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(server(methods))
    rest = args.arguments[1:] if args.arguments[:1] == ["--"] else args.arguments
    app(rest, prog_name="llm-accel transformers-serve --method ...")


def server(methods: Sequence[MethodConfig]) -> Callable[..., Any]:
    """transformers' ``Serve`` with the same parameters, whose models get these methods."""
    from transformers.cli.serve import Serve

    @functools.wraps(Serve, updated=())
    def accelerated(*given: Any, **options: Any) -> Any:
        for name, why in _REFUSED.items():
            if options.get(name):
                raise UnsupportedCallError(f"--{name.replace('_', '-')} cannot be combined with a method: {why}.")
        with accelerating(methods):
            return Serve(*given, **options)

    return accelerated


@contextmanager
def accelerating(methods: Sequence[MethodConfig]) -> Iterator[None]:
    """Within the block every model that ``transformers serve`` loads gets these methods."""
    from transformers.cli.serving import model_manager

    manager: Any = model_manager.ModelManager
    load = manager._load_model

    @functools.wraps(load)
    def load_and_apply(*given: Any, **options: Any) -> Any:
        model = load(*given, **options)
        if methods:
            apply(model, methods)
        return model

    manager._load_model = load_and_apply
    try:
        yield
    finally:
        manager._load_model = load
