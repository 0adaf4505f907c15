"""The integration in the open: a batch server in a few lines, for one large GPU. `llm-accel serve` is this with limits.

pip install "llm_accel[serve]" && python examples/serve_h100.py --model Qwen/Qwen3-8B
curl -s 127.0.0.1:8000/generate -H 'Content-Type: application/json' -d '{"prompt": "Once upon a time"}'
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel, Field
from transformers import AutoModelForCausalLM, AutoTokenizer

import llm_accel

BATCH, WINDOW_S = 16, 0.01


class Prompt(BaseModel):
    prompt: str = Field(min_length=1, max_length=400_000)
    max_new_tokens: int = Field(128, ge=1, le=1024)


def generate(model: Any, tokenizer: Any, prompts: list[Prompt]) -> list[str]:
    """One left-padded batch. The plug-in is exact under padding: a row gives what it gives alone."""
    inputs = tokenizer([one.prompt for one in prompts], return_tensors="pt", padding=True).to(model.device)
    tokens = max(one.max_new_tokens for one in prompts)
    output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    rows = [row[: one.max_new_tokens] for row, one in zip(output, prompts, strict=True)]
    return tokenizer.batch_decode(rows, skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen3-8B")
    parser.add_argument("--budget", type=int, default=2048, help="KV entries kept per head and layer")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer: Any = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto", use_safetensors=True).to(device).eval()
    handle = llm_accel.apply(model, method="snapkv", budget=args.budget)  # the whole integration
    waiting: asyncio.Queue[tuple[Prompt, asyncio.Future[str]]] = asyncio.Queue(maxsize=256)

    async def work() -> None:
        while True:
            batch = [await waiting.get()]
            await asyncio.sleep(WINDOW_S)
            while len(batch) < BATCH and not waiting.empty():
                batch.append(waiting.get_nowait())
            try:
                outcomes: list[Any] = await asyncio.to_thread(generate, model, tokenizer, [one for one, _ in batch])
            except Exception as error:
                outcomes = [error] * len(batch)
            for (_, future), outcome in zip(batch, outcomes, strict=True):
                if not future.done():  # cancelled when its client left
                    (future.set_exception if isinstance(outcome, Exception) else future.set_result)(outcome)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker = asyncio.create_task(work())
        yield
        worker.cancel()

    app = FastAPI(lifespan=lifespan)

    @app.post("/generate")
    async def answer(prompt: Prompt) -> dict[str, str]:
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        await waiting.put((prompt, future))
        return {"text": await future}

    @app.get("/report")
    def report() -> dict[str, Any]:
        return handle.report().to_dict()

    uvicorn.run(app, host="127.0.0.1", port=args.port)


if __name__ == "__main__":
    main()
