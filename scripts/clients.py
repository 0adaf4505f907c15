"""Clients of OpenAI's API against ``llm-accel serve`` on the bundled model, each in its usual way.

`make clients` makes an environment of their own and runs this.
A line per client says what came; the exit status is 1 where one failed, and a client that is not installed is skipped.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

KEY = "key-of-a-client"
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


def of_litellm(url: str) -> str:
    """A chat, and the fallback to another model where the context is too short."""
    import litellm

    short: dict[str, Any] = {"model": "openai/needle", "api_base": url, "api_key": KEY, "max_tokens": 8}
    said = litellm.completion(messages=MESSAGES, **short).choices[0].message.content
    try:
        litellm.completion(messages=[{"role": "user", "content": "dog " * 99_999}], **short)
    except litellm.ContextWindowExceededError:
        return f"answers {said!r}, and knows a context that is too short"
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
}


def main() -> int:
    """Starts a server, and asks it in the way of each client."""
    os.environ["OPENAI_API_KEY"] = KEY  # lm-eval reads it
    command = [sys.executable, "-m", "llm_accel", "serve", "--port", "0", "--method", "snapkv:budget=128"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout is not None
        url = json.loads(server.stdout.readline())["url"]
        failed = 0
        for name, (module, ask) in CLIENTS.items():
            if importlib.util.find_spec(module.partition(".")[0]) is None:
                print(f"{name}: not installed")
                continue
            try:
                print(f"{name}: {ask(url)}")
            except Exception as error:
                failed += 1
                print(f"{name}: failed with {type(error).__name__}: {error}")
        server.terminate()
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
