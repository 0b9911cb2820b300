"""Images as judges get them: frames of a video, and `data:` URLs, each encoded once for all rewards that ask."""

from __future__ import annotations

import base64
import io
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from PIL import Image

from tasks.media import JPEG_QUALITY, digest, too_long_for
from workers.base import Unscored

CACHE_BYTES = 64 * 2**20
"""How many bytes of encoded images a process keeps for the next reward that asks for them."""


class DataUrls:
    """A cache of the `data:` URLs of images; above `max_bytes` the least recently used are dropped. Thread-safe."""

    def __init__(self, max_bytes: int = CACHE_BYTES) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._lock = threading.Lock()
        self._urls: OrderedDict[tuple[str, str], Future[str]] = OrderedDict()

    def of(self, image: Image.Image, image_format: str) -> str:
        """The URL of an image. A thread waits if another thread encodes this image at that moment."""
        content = f"{image.mode} {image.size} ".encode() + image.tobytes()
        key = digest(content), image_format
        with self._lock:
            url = self._urls.get(key)
            if url is not None:
                self._urls.move_to_end(key)
            else:
                mine = self._urls[key] = Future()
        if url is not None:
            return url.result()

        try:
            mine.set_result(data_url(image, image_format))
        except BaseException as error:
            with self._lock:
                del self._urls[key]
            mine.set_exception(error)
            raise
        self._count(len(mine.result()))
        return mine.result()

    def _count(self, num_bytes: int) -> None:
        with self._lock:
            self._num_bytes += num_bytes
            for key in list(self._urls):
                if self._num_bytes <= self._max_bytes:
                    break
                if self._urls[key].done():
                    self._num_bytes -= len(self._urls.pop(key).result())


DATA_URLS = DataUrls()
"""The cache of this process."""


def data_url(image: Image.Image, image_format: str) -> str:
    """The image as a `data:` URL; JPEG and WebP at quality 95, PNG at its fastest.

    Raises:
        Unscored: The format has no images of this size.
    """
    why = too_long_for(image_format, image.height, image.width)
    if why is not None:
        raise Unscored("invalid", f"{why}; cut or shrink it, or set image_format: png")
    options: dict[str, Any] = (
        {"compress_level": 1} if image_format == "png" else {"quality": JPEG_QUALITY}
    )
    buffer = io.BytesIO()
    image.save(buffer, image_format.upper(), **options)
    return f"data:image/{image_format};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def evenly_spaced(frames: Sequence[Any], num_frames: int) -> list[Any]:
    """`num_frames` of a video from its first to its last frame, or all if it has fewer; 1 means the first frame."""
    if num_frames == 1:
        return [frames[0]]

    last = len(frames) - 1
    indices: dict[int, None] = {}  # each index once, in order
    for i in range(num_frames):
        indices[round(i * last / (num_frames - 1))] = None
    return [frames[index] for index in indices]
