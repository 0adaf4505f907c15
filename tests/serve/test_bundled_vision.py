"""The bundled vision model behind the server, asked by the openai client: answers are those of ``llm-accel vision``."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator

import pytest
import torch
from PIL import Image

from llm_accel.common.bundled import load_vision_model
from llm_accel.errors import ConfigError
from llm_accel.eval.tasks.vision.engine import VisionEngine
from llm_accel.eval.tasks.vision.examples import SceneSource
from llm_accel.eval.tasks.vision.processor import VisionProcessor
from llm_accel.eval.tasks.vision.questions import TASKS
from llm_accel.registry import parse_all
from llm_accel.serve.loading import load
from llm_accel.serve.settings import ServeSettings
from tests.serve.kit import Running, start

METHOD = "flowcut:ratio=0.33"


@pytest.fixture(scope="module")
def seeing() -> Iterator[Running]:
    served = load(ServeSettings(model="bundled:vision"))
    assert served.name == "vision"
    running = start(served.model, served.tokenizer, served.processor, allow_methods="flowcut", max_new_tokens=64)
    yield running
    running.stop()


def as_url(image: Image.Image) -> str:
    data = io.BytesIO()
    image.save(data, "png")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


@pytest.mark.parametrize("method", ["dense", METHOD])
def test_answers_are_those_of_the_evaluation(seeing: Running, method: str) -> None:
    model, processor = load_vision_model()
    source = SceneSource(3, 5, "standard", TASKS)
    engine = VisionEngine(model, VisionProcessor(processor), source.max_new_tokens, 0)
    client, right = seeing.client(), 0
    for sample in range(3):
        examples = source.examples(sample)
        with torch.no_grad():
            expected = engine.run(examples, () if method == "dense" else parse_all(method)).answers
        for example, answer in zip(examples, expected, strict=True):
            assert example.image is not None
            content = [
                {"type": "image_url", "image_url": {"url": as_url(Image.fromarray(example.image))}},
                {"type": "text", "text": example.question},
            ]
            said = client.chat.completions.create(
                model=client.models.list().data[0].id,
                messages=[{"role": "user", "content": content}],  # type: ignore[list-item,misc]
                max_tokens=source.max_new_tokens,
                temperature=0,
                extra_body={"llm_accel": {"method": method}},
            )
            assert said.choices[0].message.content == answer
            right += answer == example.answer
    assert right >= 12


def test_other_bundled_names_are_refused() -> None:
    with pytest.raises(ConfigError, match="bundled:vision"):
        load(ServeSettings(model="bundled:visoin"))
