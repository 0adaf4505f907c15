"""Images in chats: inline only, bounded before they are decoded."""

from __future__ import annotations

import base64
import binascii
import io
import warnings
from typing import TYPE_CHECKING

from llm_accel.serve.errors import BadRequest

if TYPE_CHECKING:
    from PIL.Image import Image

_FORMATS = {"data:image/png;base64": "PNG", "data:image/jpeg;base64": "JPEG", "data:image/webp;base64": "WEBP"}


def decode(url: str, max_pixels: float) -> Image:
    """An upright RGB image from a ``data:`` URL with PNG, JPEG or WebP. Its size is read from the header and checked
    before a pixel is decoded; of an animation the first frame counts.

    Raises:
        ApiError: another kind of URL, a damaged image, or one with too many pixels.
    """
    from PIL import Image as pillow
    from PIL import ImageOps

    head, _, data = url.partition(",")
    if head.lower() not in _FORMATS:
        raise BadRequest(
            "images come as data:image/png;base64,... (or jpeg, webp); the server fetches nothing from elsewhere.",
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", pillow.DecompressionBombWarning)  # the limit here is the one that counts
            image = pillow.open(io.BytesIO(base64.b64decode(data, validate=True)), formats=[_FORMATS[head.lower()]])
        if image.width * image.height > max_pixels:
            raise BadRequest(f"an image has {image.width} x {image.height} pixels; {max_pixels:.0f} are allowed.")
        return ImageOps.exif_transpose(image).convert("RGB")
    except (binascii.Error, OSError, SyntaxError, ValueError, pillow.DecompressionBombError) as error:
        raise BadRequest(f"an image cannot be decoded ({type(error).__name__}).") from error
