"""The HTTP API against its own OpenAPI description: what it promises for valid and invalid requests alike."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from tests.eval.needle_helpers import tiny_model, tokenizer
from tests.serve.kit import ALICE, Running, start

HEADERS = {"Authorization": f"Bearer {ALICE}"}


@pytest.fixture(scope="module", params=[True, False], ids=["strict", "lenient"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    keys = Path(tmp_path_factory.mktemp("keys")) / "keys"
    keys.write_text(ALICE)
    running = start(tiny_model(), tokenizer(), api_key_file=str(keys), strict_fields=request.param, max_new_tokens=4)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def schema(server: Running) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json", headers=HEADERS)


OPERATIONS = {
    "POST /v1/chat/completions": 40,
    "POST /v1/completions": 40,
    "POST /tokenize": 20,
    "POST /detokenize": 20,
    "GET /version": 1,
    "GET /v1/models": 1,
    "GET /v1/models/{model_name}": 10,
    "GET /live": 1,
    "GET /ready": 1,
    "GET /health": 1,
    "GET /metrics": 1,
}


def test_the_description_is_complete_and_needs_a_key(schema: Any, server: Running) -> None:
    assert {operation.ok().label for operation in schema.get_all_operations()} == set(OPERATIONS)
    assert httpx.get(f"{server.url}/openapi.json").status_code == 401
    chat = schema.raw_schema["components"]["schemas"]["ChatRequest"]["properties"]
    assert chat["model"] == {"enum": ["needle"]} and chat["tools"] == {"enum": [None, []]}
    assert {"maximum": 4, "minimum": 0, "type": "integer"} in chat["max_tokens"]["anyOf"]
    assert chat["messages"]["maxItems"] == 4096 and chat["seed"]["anyOf"][0]["maximum"] == 2**63 - 1
    extension = schema.raw_schema["components"]["schemas"]["Extension"]["properties"]
    assert extension["method"]["description"].endswith(": dense")


@pytest.mark.parametrize(
    ("label", "mode"),
    [(label, mode) for label in OPERATIONS for mode in GenerationMode if mode.is_positive or label.startswith("POST")],
)
def test_answers_are_as_described(schema: Any, server: Running, label: str, mode: GenerationMode) -> None:
    """Any status is among the described ones, any body has the described shape, what breaks the description is refused,
    and nothing is an error of the server. Valid requests may still be refused: a method is any text."""
    operation = next(found.ok() for found in schema.get_all_operations() if found.ok().label == label)

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=OPERATIONS[label],
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=HealthCheck,
    )
    def fuzz(case: Any) -> None:
        response = case.call(headers=HEADERS)
        assert response.status_code not in (500, 503), response.text  # 504 is what a deadline of no time asks for
        excluded = [not_a_server_error, positive_data_acceptance]
        if response.status_code == 413:  # too large to be looked at, and schemathesis does not count that as refused
            excluded.append(negative_data_rejection)
        case.validate_response(response, excluded_checks=excluded)

    fuzz()
    assert server.http.get(f"{server.url}/health").json() == {"status": "ok"}
