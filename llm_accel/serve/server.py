"""uvicorn with an end in good order: after SIGTERM every accepted request is finished, or told that it is not."""

from __future__ import annotations

import asyncio
import socket

import uvicorn

from llm_accel.serve.app import create_app
from llm_accel.serve.connections import Connection
from llm_accel.serve.loading import Served
from llm_accel.serve.settings import ServeSettings

_TICK_S = 0.02
_GRACE_S = 5.0  # what the answers of abandoned requests have to leave


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
        self.engine.drain()
        end = loop.time() + self._drain_s
        late = loop.call_at(end, self.engine.abandon)
        while self.engine.working and loop.time() < end and not self.force_exit:
            await asyncio.sleep(_TICK_S)
        await super().shutdown(sockets)
        late.cancel()
