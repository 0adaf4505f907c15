"""Images in chats: what the model says to them, and which are refused before they are decoded."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
from jinja2 import TemplateError, UndefinedError
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

import llm_accel
from tests.serve.kit import Running, start
from tests.tiny_vlm import IMAGE, tiny_vlm

TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
)


@pytest.fixture(scope="module")
def processor() -> LlavaProcessor:
    vocabulary = {f"w{number}": number for number in range(128) if number != IMAGE} | {"<image>": IMAGE}
    backend: Any = Tokenizer(models.WordLevel(vocabulary, unk_token="w2"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="w0", unk_token="w2", extra_special_tokens={"image_token": "<image>"}
    )
    size = {"height": 28, "width": 28}
    pixels = CLIPImageProcessor(size=size, crop_size=size)
    return LlavaProcessor(
        pixels, tokenizer, patch_size=7, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )  # fmt: skip


@pytest.fixture(scope="module")
def seeing(processor: LlavaProcessor) -> Iterator[Running]:
    running = start(
        tiny_vlm(), processor.tokenizer, processor, allow_methods="all", max_images=2, max_image_pixels=2000
    )
    yield running
    running.stop()


def url(size: tuple[int, int] = (40, 30), kind: str = "png") -> str:
    image = Image.effect_mandelbrot(size, (-2, -1, 1, 1), 50).convert("RGB")
    data = io.BytesIO()
    image.save(data, kind)
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"


def bomb(side: int) -> str:
    """A PNG of side x side pixels in a few bytes: its header is all there is."""
    size = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    header = b"IHDR" + size
    pixels = struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))  # there are none
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(size)) + header + struct.pack(">I", zlib.crc32(header)) + pixels
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def chat(running: Running, *parts: Any, **fields: Any) -> Any:
    content = [
        part if isinstance(part, dict)
        else {"type": "image_url", "image_url": {"url": part}} if ":" in part
        else {"type": "text", "text": part}
        for part in parts
    ]  # fmt: skip
    body = {"model": "needle", "messages": [{"role": "user", "content": content}], "max_tokens": 6}
    return running.post("/v1/chat/completions", body | fields)


@pytest.mark.parametrize("method", ["dense", "flowcut:budget=5+dyvte:exit=1"])
def test_answers_equal_plain_generate(seeing: Running, processor: LlavaProcessor, method: str) -> None:
    model = tiny_vlm()
    image = Image.effect_mandelbrot((40, 30), (-2, -1, 1, 1), 50).convert("RGB")
    inputs = processor(text=["<image> w5 w6 "], images=[image], return_tensors="pt")
    if method != "dense":
        llm_accel.apply(model, llm_accel.registry.parse_all(method))
    row = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    answer = chat(seeing, url(), "w5 w6", llm_accel={"method": method}).json()
    assert answer["choices"][0]["message"]["content"] == processor.tokenizer.decode(row, skip_special_tokens=True)
    assert answer["usage"]["prompt_tokens"] == 18
    seeing.idle()
    metrics, name = seeing.metrics(), "dense" if method == "dense" else "flowcut+dyvte"
    stored, seen = (metrics[f'llm_accel_{kind}_tokens_total{{method="{name}"}}'] for kind in ("physical", "logical"))
    cut = seen - stored
    assert cut == 0 if method == "dense" else 16 - 5 < cut < 16  # the last layer sees no image at all


def test_text_alone_is_served_too(seeing: Running) -> None:
    assert chat(seeing, "w5 w6").json()["usage"]["prompt_tokens"] == 2


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        (["https://example.com/a.png"], "fetches nothing"),
        (["file:///etc/passwd"], "fetches nothing"),
        (["data:image/svg+xml;base64,AAAA"], "fetches nothing"),
        (["data:image/png;base64,****"], "cannot be decoded"),
        (["data:image/png;base64,AAAA"], "cannot be decoded"),
        ([url(kind="jpeg").replace("jpeg", "png")], "cannot be decoded"),
        ([url()[:-200]], "cannot be decoded"),
        ([url((50, 41))], "50 x 41 pixels"),
        ([bomb(12000)], "12000 x 12000 pixels"),
        ([bomb(60000)], "DecompressionBombError"),
        ([url()] * 3, "2 are allowed"),
        ([url(), "w5 <image>"], "stands for an image"),
    ],
)
def test_images_that_are_refused(seeing: Running, parts: list[str], says: str) -> None:
    response = chat(seeing, *parts)
    assert response.status_code == 400 and says in response.json()["error"]["message"], response.text


@pytest.mark.parametrize("prompt", ["w5 <image> w6", [5, IMAGE], [[5], [IMAGE, 6]]])
def test_placeholders_without_their_image_are_refused(seeing: Running, prompt: Any) -> None:
    """The model would fail on them, which would count against the server's health."""
    response = seeing.complete(prompt)
    assert response.status_code == 400 and "stands for an image" in response.text


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (TemplateError("roles must alternate"), "roles must alternate"),
        (UndefinedError("'dict object' has no attribute 'role'"), None),
        (TypeError("<Made object at 0x7f00> cannot be joined"), None),
    ],
)
def test_templates_say_what_they_mean_to_say_and_no_more(
    seeing: Running, monkeypatch: pytest.MonkeyPatch, error: Exception, told: str | None
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(LlavaProcessor, "apply_chat_template", fail)
    response = chat(seeing, "w5")
    message = response.json()["error"]["message"]
    expected = "the model's chat template does not take these messages" + ("." if told is None else f": {told}")
    assert response.status_code == 400 and message == expected


def test_one_row_and_no_session(seeing: Running) -> None:
    assert chat(seeing, url(), n=2).status_code == 400 == chat(seeing, url(), llm_accel={"session": "s"}).status_code
