"""What must not happen: huge bodies in memory, code from a model's folder, prompts and keys in the log."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch

from llm_accel import ConfigError
from llm_accel.serve.loading import load
from llm_accel.serve.settings import ServeSettings
from tests.eval.needle_helpers import tiny_model, tokenizer
from tests.serve.kit import ALICE, Running, wait_for

MIB = 2**20


def test_a_body_of_100_mib_is_refused_unread(running: Running) -> None:
    sent = 0

    def parts() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(100):
            sent += MIB
            yield b" " * MIB

    before = running.outcomes().get("too_large", 0)
    headers = {"Authorization": f"Bearer {ALICE}", "Content-Type": "application/json"}
    for length in ({}, {"Content-Length": str(100 * MIB)}):
        try:
            response = httpx.post(f"{running.url}/v1/completions", content=parts(), headers=headers | length)
            assert response.status_code == 413
        except httpx.TransportError:  # the connection was closed while the body was on its way
            pass
    wait_for(lambda: running.outcomes().get("too_large", 0) == before + 2)
    assert sent < 150 * MIB and running.complete().status_code == 200


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    model = tiny_model()
    model.config.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load(ServeSettings(model=str(tmp_path)))


@pytest.mark.parametrize("auto", ["AutoConfig", "AutoTokenizer"])
def test_code_of_a_model_does_not_run(auto: str, tmp_path: Path) -> None:
    folder, witness = tmp_path / "model", tmp_path / "witness"
    tiny_model().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    (folder / "code.py").write_text(f"open({str(witness)!r}, 'w')\nclass Made: ...\n")
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text())
        kind = {"model_type": "made", "tokenizer_class": "Made"}
        content |= {"auto_map": {auto: "code.Made"}} | {key: kind[key] for key in kind if key in content}
        (folder / name).write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load(ServeSettings(model=str(folder)))
    assert not witness.exists()


def test_neither_prompts_nor_keys_are_logged(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    body = {"model": "needle", "prompt": "a secret", "max_tokens": 2}
    with running.held():
        running.brake.error = ValueError("cannot read 'a secret'")
    assert running.post("/v1/completions", body).status_code == 500
    assert running.post("/v1/completions", body).status_code == 200
    assert running.post("/v1/completions", body | {"llm_accel": {"method": "a secret"}}).status_code == 400
    running.post("/v1/completions", body, key="key-of-mallory")
    running.idle()
    assert "failed: ValueError" in caplog.text and "/v1/completions ok" in caplog.text
    assert not any(word in record.getMessage() for word in ("secret", "key-of") for record in caplog.records)
