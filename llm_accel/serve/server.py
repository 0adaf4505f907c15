"""uvicorn with sockets that answers leave without delay, connections that do not stay open for nothing, and an end in
good order: after SIGTERM every accepted request is finished, or told that it is not."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from llm_accel.errors import ConfigError
from llm_accel.serve.app import create_app
from llm_accel.serve.loading import Served
from llm_accel.serve.settings import ServeSettings

HEAD_SECONDS = 10.0  # for the head of a request to arrive
READ_SECONDS = 60.0  # for a client to read on when more of an answer waits than is buffered
_READ = 2**13  # bytes that are parsed at a time, so that many tiny chunks do not hold the event loop
_TICK_S = 0.02
_GRACE_S = 5.0  # what the answers of abandoned requests have to leave


def bind(host: str, port: int) -> socket.socket:
    """A socket at the address, on which nobody listens yet. Its protocol is named, for asyncio to turn off Nagle's
    algorithm: with it the second write of an answer waits for the acknowledgement of the first one, some 40 ms.

    Raises:
        ConfigError: the address is taken, or none of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host.strip("[]"), port))
    except OSError as error:
        listener.close()
        raise _unusable(host, port, error) from error
    return listener


def listen(listener: socket.socket, backlog: int) -> None:
    """Clients can connect from now on, and wait until they are served.

    Raises:
        ConfigError: another one began to listen there since :func:`bind`.
    """
    try:
        listener.listen(backlog)
    except OSError as error:
        host, port = listener.getsockname()[:2]
        raise _unusable(host, port, error) from error


def _unusable(host: str, port: int, error: OSError) -> ConfigError:
    """Why nobody can listen at the address."""
    return ConfigError(f"--host {host} --port {port}: {error.strerror}; give another one, or --port 0 for a free port.")


class Connection(H11Protocol):
    """Closes connections whose client does not send a whole head in time, goes on sending a body that is answered
    already, or does not read its answer. The time for a head begins with the connection, or with the first byte after
    an answer; uvicorn's own limit is for those that send nothing at all after an answer."""

    _closing: asyncio.TimerHandle | None = None
    _aborting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begins the time for the first head."""
        super().connection_made(transport)
        if hasattr(transport, "max_size"):  # asyncio's own transports
            transport.max_size = _READ
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Ends the time where a request is complete enough to be answered."""
        super().data_received(data)
        self._watch()

    def pause_writing(self) -> None:
        """Begins the time for the client to read on."""
        super().pause_writing()
        self._aborting = self.loop.call_later(READ_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """The client has read on."""
        super().resume_writing()
        self._go_on()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is left to close."""
        super().connection_lost(exc)
        self._stop()
        self._go_on()

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop()
        elif self._closing is None:
            self._closing = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _stop(self) -> None:
        if self._closing is not None:
            self._closing.cancel()
            self._closing = None

    def _go_on(self) -> None:
        if self._aborting is not None:
            self._aborting.cancel()
            self._aborting = None


class Server(uvicorn.Server):
    """One model on one address; ``run()`` serves until SIGTERM, SIGINT or ``should_exit``.

    Raises:
        LlmAccelError: the keys or the default method cannot be used.
    """

    def __init__(self, served: Served, settings: ServeSettings) -> None:
        app, self.engine = create_app(served, settings)
        self._drain_s = settings.drain_s
        config = uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            http=Connection,
            ws="none",
            lifespan="on",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            log_level="warning",
            timeout_graceful_shutdown=int(settings.drain_s + _GRACE_S),
        )
        super().__init__(config)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finishes accepted requests within the time for it, and fails the others. New ones are told so until then."""
        loop = asyncio.get_running_loop()
        self.engine.scheduler.close()
        end = loop.time() + self._drain_s
        late = loop.call_at(end, self.engine.abandon)
        while self.engine.thread.is_alive() and loop.time() < end and not self.force_exit:
            await asyncio.sleep(_TICK_S)
        await super().shutdown(sockets)
        late.cancel()
