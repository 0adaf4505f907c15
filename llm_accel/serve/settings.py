"""What a server is made of. The same class feeds Python and the command line."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from llm_accel.common.arguments import ModelOptions
from llm_accel.common.options import option
from llm_accel.errors import ConfigError, unknown_name
from llm_accel.methods import list_methods
from llm_accel.patches.plan import DECODES
from llm_accel.registry import parse_all

KEY_VARIABLE = "LLM_ACCEL_API_KEY"
_ALL = "all"

# options under the heading of that name
_model, _address, _queue, _limits, _conversations = (
    partial(option, group=name) for name in ("model", "address", "queue", "limits", "conversations")
)


@dataclass(frozen=True, kw_only=True)
class ServeSettings(ModelOptions):
    """Options of the server; :class:`ConfigError` for values that cannot work."""

    model: str | None = _model(
        "HuggingFace model, or bundled:vision (default: bundled:needle)", None, metavar="ID|PATH"
    )
    method: str = _model(
        "method of requests that name none; dense is the plain model", "dense", metavar="NAME[:OPTION=...]"
    )
    allow_methods: str | None = _model(
        "methods that requests may use besides --method and dense (default: none); 'all' allows every method",
        None,
        metavar="NAME,...",
    )
    name: str | None = _model("what the API calls the model (default: its id or folder)", None, metavar="NAME")
    decode: str = _model("decode steps as one graph per batch size; auto: on a GPU", "eager", choices=DECODES)
    trust_remote_code: bool = _model("run Python code that comes with the model", False)

    host: str = _address("address to listen on; anything but loopback needs a key", "127.0.0.1", metavar="ADDRESS")
    port: int = _address("0 picks a free port", 8000, least=0)
    api_key_file: str | None = _address(
        f"file with one bearer key per line (or one key in the environment variable {KEY_VARIABLE})",
        None,
        metavar="FILE",
    )

    max_batch: int = _queue("rows that run at a time: prompts that are read, and answers", 8, least=1)
    max_step_tokens: int | None = _queue(
        "tokens of prompts read between decode steps (default: on a CPU 256, 2048 while none decodes, else 8192)",
        None,
        least=1,
    )
    kv_memory_mib: float | None = _queue(
        "memory for keys and values of all rows; those that may pass it wait (default: no limit)", None, least=0.001
    )
    max_queue: int = _queue("requests that may wait; any more get status 429", 64, least=1)
    deadline_s: float = _queue(
        "time that a request has, reading and waiting included; requests may ask for less", 120.0, least=0.001
    )
    drain_s: float = _queue("time that accepted requests have to finish after SIGTERM", 30.0, least=0)

    max_body_mib: float = _limits("largest request body", 8.0, least=0.001)
    max_model_len: int | None = _limits(
        "tokens of prompt and answer together (default: the model's context)", None, least=2
    )
    max_prompt_tokens: int | None = _limits(
        "tokens of a prompt (default: what the model's context holds)", None, least=1
    )
    max_new_tokens: int | None = _limits("tokens of an answer (default: what the context leaves)", None, least=1)
    strict_fields: bool = _limits("refuse requests with unknown fields instead of ignoring the fields", False)
    max_images: int = _limits("images of a request, for vision-language models", 8, least=1)
    max_image_pixels: float = _limits("pixels of an image", 16e6, least=1)
    max_sessions: int = _conversations(
        "conversations whose cache is kept; the one unused longest is dropped first", 64, least=0
    )
    max_session_mib: float = _conversations("size of all kept caches together", 1024.0, least=0)

    def validate(self) -> None:
        if self.port > 65535:
            raise ConfigError(f"--port {self.port}: give a number from 0 to 65535.")
        self.allowed()

    def allowed(self) -> frozenset[str]:
        """Names of the methods that requests may use.

        Raises:
            LlmAccelError: ``method`` cannot be used, or there is no method of an allowed name.
        """
        own = {"dense", *(config.name for config in parse_all(self.method))}
        names = [name.strip() for name in (self.allow_methods or "").split(",") if name.strip()]
        for name in names:
            if name not in list_methods() and name != _ALL:
                raise ConfigError("--allow-methods: " + unknown_name("method", name, [*list_methods(), _ALL]))
        return frozenset(list_methods() if _ALL in names else own.union(names))

    def keys(self) -> tuple[str, ...]:
        """The bearer keys; none for a server on loopback that asks for none.

        Raises:
            ConfigError: the file cannot be used, a key is too short, or an open address has no key.
        """
        keys = [os.environ.get(KEY_VARIABLE, "").strip()]
        if self.api_key_file is not None:
            try:
                lines = Path(self.api_key_file).expanduser().read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"--api-key-file {self.api_key_file!r} cannot be read: {error}.") from error
            keys += [line.strip() for line in lines]
            if not any(keys):
                raise ConfigError(f"--api-key-file {self.api_key_file!r} holds no key; write one per line.")
        found = tuple(dict.fromkeys(filter(None, keys)))
        if any(len(key) < 8 or not key.isascii() for key in found):
            raise ConfigError("an API key has fewer than 8 characters or some outside ASCII; give longer random ones.")
        if not found and not is_loopback(self.host):
            raise ConfigError(
                f"--host {self.host} is open to other machines; set {KEY_VARIABLE} or --api-key-file, "
                "or listen on 127.0.0.1."
            )
        return found


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def context_of(model: Any, settings: ServeSettings) -> int | None:
    """Tokens of prompt and answer together, if there is a bound."""
    known = (getattr(model.config.get_text_config(), "max_position_embeddings", None), settings.max_model_len)
    return min(filter(None, known), default=None)
