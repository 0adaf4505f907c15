"""What a server is made of. The same class feeds Python and the command line."""

from __future__ import annotations

import dataclasses
import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_accel.errors import ConfigError, unknown_name
from llm_accel.eval.arguments import DTYPES, one_of
from llm_accel.methods import list_methods as methods
from llm_accel.patches.plan import DECODES
from llm_accel.registry import parse_all

KEY_VARIABLE = "LLM_ACCEL_API_KEY"
_ALL = "all"


def _option(help: str, default: Any, metavar: str = "N") -> Any:
    return dataclasses.field(default=default, metadata={"help": help, "metavar": metavar})


@dataclass(frozen=True)
class ServeSettings:
    """Options of the server; :class:`ConfigError` for values that cannot work.

    Attributes: see the help of each field, which is also that of the command line.
    """

    model: str | None = _option("HuggingFace model, or bundled:vision (default: bundled:needle)", None, "ID|PATH")
    method: str = _option("method of requests that name none; dense is the plain model", "dense", "NAME[:OPTION=...]")
    allow_methods: str | None = _option(
        "methods that requests may use beside that of --method and dense (default: none); all: every one",
        None,
        "NAME,...",
    )
    name: str | None = _option("what the API calls the model (default: its id or folder)", None, "NAME")
    device: str = _option("cpu, cuda, cuda:1, ... (default: cuda if there is one)", "auto", "NAME")
    dtype: str = _option("default: the checkpoint's; bundled model on a CPU: float32", "auto", "|".join(DTYPES))
    attn: str | None = _option("attention implementation (default: transformers' choice)", None, "NAME")
    decode: str = _option("decode steps as one graph per batch size; auto: on a GPU", "eager", "|".join(DECODES))
    trust_remote_code: bool = _option("run Python code that comes with the model", False)

    host: str = _option("address to listen on; anything but loopback needs a key", "127.0.0.1", "ADDRESS")
    port: int = _option("0 takes a free one", 8000)
    api_key_file: str | None = _option(
        f"file with one bearer key per line (or one key in the environment variable {KEY_VARIABLE})", None, "FILE"
    )

    max_batch: int = _option("rows of a batch", 8)
    max_batch_tokens: int = _option("rows times longest prompt and answer; a request that is larger runs alone", 65536)
    window_ms: float = _option("how long a request waits for others to share its batch", 5.0)
    max_queue: int = _option("requests that may wait; further ones get status 429", 64)
    deadline_s: float = _option(
        "time that a request has, reading and waiting included; requests may ask for less", 120.0
    )
    drain_s: float = _option("time that accepted requests have to finish after SIGTERM", 30.0)

    max_body_mib: float = _option("size of a request", 8.0)
    max_prompt_tokens: int | None = _option("tokens of a prompt (default: what the model's context holds)", None)
    max_new_tokens: int = _option("tokens of an answer, and those of a request that names no number", 1024)
    max_images: int = _option("images of a request, for vision-language models", 8)
    max_image_pixels: float = _option("pixels of an image", 16e6)
    max_sessions: int = _option("conversations that keep their cache; the one unused longest goes first", 64)
    max_session_mib: float = _option("bytes of all kept caches together", 1024.0)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least: float = 0 if field.name in ("port", "window_ms", "max_sessions", "max_session_mib", "drain_s") else 1
            if field.name in ("deadline_s", "max_body_mib"):
                least = 0.001
            if isinstance(value, int | float) and not isinstance(value, bool) and not least <= value < float("inf"):
                raise ConfigError(f"{flag(field.name)} {value}: give a finite number of at least {least}.")
        if self.port > 65535:
            raise ConfigError(f"--port {self.port}: give a number from 0 to 65535.")
        one_of(DECODES, decode=self.decode)
        one_of(DTYPES, dtype=self.dtype)
        self.allowed()

    def allowed(self) -> frozenset[str]:
        """Names of the methods that requests may use.

        Raises:
            LlmAccelError: ``method`` cannot be used, or there is no method of an allowed name.
        """
        own = {"dense", *(config.name for config in parse_all(self.method))}
        names = [name.strip() for name in (self.allow_methods or "").split(",") if name.strip()]
        for name in names:
            if name not in methods() and name != _ALL:
                raise ConfigError("--allow-methods: " + unknown_name("method", name, [*methods(), _ALL]))
        return frozenset(methods() if _ALL in names else own.union(names))

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


def flag(name: str) -> str:
    """The option of the command line for a field."""
    return "--" + name.replace("_", "-")
