"""``llm-accel serve``: arguments, loading, serving until a signal."""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import signal
import socket
import sys
from typing import TYPE_CHECKING

from llm_accel.errors import ConfigError
from llm_accel.serve.settings import ServeSettings, context_of

if TYPE_CHECKING:
    from llm_accel.serve.server import Server

log = logging.getLogger(__name__)

add_arguments = ServeSettings.add_arguments


def run(args: argparse.Namespace) -> None:
    """Serves until SIGTERM or SIGINT. The first line of stdout is a JSON object with the address.

    Raises:
        LlmAccelError: anything wrong with the arguments, the model or the method, before the server listens.
    """
    settings = ServeSettings.from_arguments(args)
    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"serve needs {', '.join(missing)}; install them with: pip install 'llm_accel[serve]'")
    settings.keys()  # what is wrong with them is known before the model is loaded
    from llm_accel.serve.loading import load
    from llm_accel.serve.server import Server, bind, listen

    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(name)s %(message)s")
    with bind(settings.host, settings.port) as listener:  # a taken port is known before the model is loaded
        served = load(settings)
        server = Server(served, settings)
        slots = ", ".join(f"{rows} of {method}" for method, rows in server.engine.slots().items())
        log.info("rows of %s tokens that run at a time: %s", context_of(served.model, settings), slots)
        listen(listener, server.config.backlog)
        _serve(server, served.name, listener)


def _serve(server: Server, name: str, listener: socket.socket) -> None:
    host, port = listener.getsockname()[:2]
    for number in (signal.SIGTERM, signal.SIGINT):  # before uvicorn listens to them; at its end it raises them again
        signal.signal(number, lambda *_: setattr(server, "should_exit", True))
    host = f"[{host}]" if ":" in host else host
    print(json.dumps({"url": f"http://{host}:{port}/v1", "model": name}), flush=True)
    server.run(sockets=[listener])
