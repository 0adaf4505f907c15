"""Replicas and autoscaling: each replica is the server of `llm-accel serve` on a GPU of its own, Ray Serve spreads the
requests and starts or stops replicas as the load asks for.

pip install "llm_accel[serve,ray]" && python examples/ray_serve.py --model Qwen/Qwen3-8B --method snapkv:budget=2048
curl -s 127.0.0.1:8000/v1/models

On a cluster run it on the head node; the replicas go wherever Ray finds a GPU.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from ray import serve

from llm_accel.serve.app import create_app
from llm_accel.serve.loading import load
from llm_accel.serve.settings import ServeSettings


@serve.deployment
@serve.ingress()
class Replica:
    """A model, its queue and its inference thread."""

    def __init__(self, settings: ServeSettings) -> None:
        # what comes in through Ray is as open as the address that Ray listens on, so the same keys are asked for
        self.server_app, self.engine = create_app(load(settings), settings)

    def __serve_build_asgi_app__(self) -> Any:
        return self.server_app

    def check_health(self) -> None:
        """Ray replaces a replica that raises here."""
        if self.engine.status not in ("ok", "shutting down"):
            raise RuntimeError(f"the engine is {self.engine.status}")


def application(settings: ServeSettings, least: int, most: int) -> serve.Application:
    """From ``least`` to ``most`` replicas. Ray keeps requests back while all replicas have a batch running and the next
    one waiting, so that a new replica finds work at once."""
    settings.keys()  # what is wrong with them is known here, not in a replica
    scaling = {"min_replicas": least, "max_replicas": most, "target_ongoing_requests": settings.max_batch}
    return Replica.options(
        autoscaling_config=scaling | {"upscale_delay_s": 10, "downscale_delay_s": 300},
        max_ongoing_requests=2 * settings.max_batch,
        max_queued_requests=settings.max_queue * most,  # further ones get status 503
        ray_actor_options={"num_gpus": 1} if torch.cuda.is_available() else {"num_cpus": 1},
        graceful_shutdown_timeout_s=settings.drain_s,
        health_check_period_s=10,
    ).bind(settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: the bundled model")
    parser.add_argument("--method", default="snapkv:budget=2048")
    parser.add_argument("--min", type=int, default=1, help="replicas at least (default: %(default)s)")
    parser.add_argument("--max", type=int, default=8, help="replicas at most (default: %(default)s)")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--api-key-file")
    args = parser.parse_args()
    settings = ServeSettings(
        model=args.model, method=args.method, host=args.host, port=args.port, api_key_file=args.api_key_file
    )
    serve.start(http_options={"host": settings.host, "port": settings.port})
    serve.run(application(settings, args.min, args.max), blocking=True)


if __name__ == "__main__":
    main()
