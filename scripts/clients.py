"""Clients of OpenAI's API against ``llm-accel serve`` on the bundled model, each in its usual way.

`make clients` makes an environment of their own and runs this.
A line per client says what came; the exit status is 1 where one failed, and a client that is not installed is skipped.
`python scripts/clients.py openai` asks in the way of some of them only.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

KEY = "key-of-a-client"
NODE = "../build/clients/node_modules/openai"  # from this folder
MESSAGES: Any = [{"role": "user", "content": "The dog watched the old river."}]
PROMPTS = [f"The dog {number}" for number in range(20)]


def of_openai(url: str) -> str:
    """Sync, async, a stream, and errors."""
    import openai

    client = openai.OpenAI(base_url=url, api_key=KEY, max_retries=0)
    whole = client.chat.completions.create(model="needle", messages=MESSAGES, max_tokens=8).choices[0].message.content
    stream = client.chat.completions.create(model="needle", messages=MESSAGES, max_tokens=8, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole

    async def later() -> str:
        async with openai.AsyncOpenAI(base_url=url, api_key=KEY) as other:
            answer = await other.chat.completions.create(model="needle", messages=MESSAGES, max_tokens=8)
            return answer.choices[0].message.content or ""

    assert asyncio.run(later()) == whole
    try:
        client.chat.completions.create(model="needle", messages=[{"role": "user", "content": "dog " * 99_999}])
    except openai.BadRequestError as error:
        assert error.code == "context_length_exceeded", error
    return f"answers {whole!r}"


def of_node(url: str) -> str:
    """openai for JavaScript: a chat, a stream, and errors."""
    asked = ["node", str(Path(__file__).with_name("clients.mjs")), url, KEY, json.dumps(MESSAGES)]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-500:]
    return done.stdout.strip()


def of_litellm(url: str) -> str:
    """A chat, and a router that goes on to a model of longer context where that of the first is too short."""
    import litellm

    def model(name: str, base: str) -> dict[str, Any]:
        return {"model_name": name, "litellm_params": {"model": "openai/needle", "api_base": base, "api_key": KEY}}

    long = [{"role": "user", "content": "dog " * 99}]
    with serving("--max-model-len", "64") as short:
        models = [model("short", short), model("long", url)]
        router = litellm.Router(models, num_retries=0)
        said = router.completion("short", MESSAGES, max_tokens=8).choices[0].message.content
        try:
            router.completion("short", long, max_tokens=8)
        except litellm.ContextWindowExceededError:
            falls = litellm.Router(models, num_retries=0, context_window_fallbacks=[{"short": ["long"]}])
            longer = falls.completion("short", long, max_tokens=8).choices[0].message.content
            return f"answers {said!r}, and {longer!r} by the model of longer context"
    raise AssertionError("litellm takes a context that is too short for something else")


def of_langchain(url: str) -> str:
    """Twenty prompts in one request, and a chat."""
    from langchain_openai import ChatOpenAI, OpenAI

    made = OpenAI(model="needle", base_url=url, api_key=KEY, max_tokens=8).generate(PROMPTS)
    chat = ChatOpenAI(model="needle", base_url=url, api_key=KEY, max_tokens=8).invoke("The dog")
    assert len(made.generations) == len(PROMPTS)
    return f"generates for {len(PROMPTS)} prompts, chats {chat.content!r}"


def of_llama_index(url: str) -> str:
    """A completion and a chat."""
    from llama_index.core.llms import ChatMessage
    from llama_index.llms.openai_like import OpenAILike

    options: dict[str, Any] = {"model": "needle", "api_base": url, "api_key": KEY, "max_tokens": 8}
    said = OpenAILike(**options).complete("The dog").text
    chat = OpenAILike(**options, is_chat_model=True).chat([ChatMessage(role="user", content="The dog")])
    return f"completes {said!r}, chats {chat.message.content!r}"


def of_lm_eval(url: str) -> str:
    """Log-likelihoods by `local-completions`, compared with those of the model here, and both ways of generating."""
    import torch
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model
    from lm_eval.models.api_models import JsonChatStr

    from llm_accel.common.bundled import load_needle_model, needle_model_path

    def asked(kind: str, *arguments: Any) -> list[Instance]:
        return [Instance(request_type=kind, doc={}, arguments=arguments, idx=0)]

    path, until = str(needle_model_path()), {"until": ["."], "max_gen_toks": 8}
    model = get_model("local-completions")(
        model="needle", base_url=f"{url}/completions", tokenizer=path, tokenizer_backend="huggingface", batch_size=4
    )
    [(found, greedy)] = model.loglikelihood(asked("loglikelihood", "The dog watched", " the old river."))
    local, tokenizer = load_needle_model()
    ids = tokenizer("The dog watched the old river.", add_special_tokens=False)["input_ids"]
    begin = len(tokenizer("The dog watched", add_special_tokens=False)["input_ids"])
    with torch.no_grad():
        known = local(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = float(known[begin - 1 : -1].gather(-1, torch.tensor(ids)[begin:, None]).sum())
    assert abs(found - expected) < 1e-3, (found, expected)
    said = model.generate_until(asked("generate_until", "The dog", until))[0]
    chats = get_model("local-chat-completions")(model="needle", base_url=f"{url}/chat/completions")
    chat = chats.generate_until(asked("generate_until", JsonChatStr(json.dumps(MESSAGES)), until))[0]
    return f"log-likelihood {found:.4f} (greedy: {greedy}), generates {said!r}, chats {chat!r}"


CLIENTS: dict[str, tuple[str, Callable[[str], str]]] = {
    "openai": ("openai", of_openai),
    "litellm": ("litellm", of_litellm),
    "LangChain": ("langchain_openai", of_langchain),
    "LlamaIndex": ("llama_index.llms.openai_like", of_llama_index),
    "lm-eval": ("lm_eval", of_lm_eval),
    "node": (NODE, of_node),
}


def installed(module: str) -> bool:
    """Whether there is such a package of Python, or openai for node."""
    if module != NODE:
        return importlib.util.find_spec(module.partition(".")[0]) is not None
    return shutil.which("node") is not None and (Path(__file__).parent / NODE).is_dir()


@contextmanager
def serving(*options: str) -> Iterator[str]:
    """A server on the bundled model until the end of the block: its URL."""
    command = [sys.executable, "-m", "llm_accel", "serve", "--port", "0", "--method", "snapkv:budget=128", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout is not None
        try:
            yield json.loads(server.stdout.readline())["url"]
        finally:
            server.terminate()


def main() -> int:
    """Starts a server, and asks it in the way of each client."""
    os.environ["OPENAI_API_KEY"] = KEY  # lm-eval reads it
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it fetches prices at its import otherwise
    wanted, failed = sys.argv[1:] or list(CLIENTS), 0
    others = [name for name in wanted if name not in CLIENTS]
    if others:
        raise SystemExit(f"no such client: {', '.join(others)}; there are {', '.join(CLIENTS)}.")
    with serving() as url:
        for name in wanted:
            module, ask = CLIENTS[name]
            if not installed(module):
                print(f"{name}: not installed")
                continue
            try:
                print(f"{name}: {ask(url)}")
            except Exception as error:
                failed += 1
                print(f"{name}: failed with {type(error).__name__}: {error}")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
