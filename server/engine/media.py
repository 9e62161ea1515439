"""Images in requests: fetched, decoded and limited by vLLM, with stricter defaults.

vLLM by default fetches from any host, follows redirects, and decodes some forty formats. Here an
image comes in the request itself unless the operator names hosts, and in a format that browsers
show. The checks sit in vLLM's media connector, which every route goes through.
"""

from __future__ import annotations

import struct
from collections.abc import MutableMapping
from io import BytesIO
from typing import Any

from PIL import Image, UnidentifiedImageError
from vllm import envs
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.media import (
    MEDIA_CONNECTOR_REGISTRY,
    ImageMediaIO,
    MediaConnector,
    MediaWithBytes,
)

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
# 100 MB when decoded, and more than any model looks at.
MAX_PIXELS = 1 << 25
MAX_BYTES = 32 << 20
MAX_IMAGES = 16
_CONNECTOR = "trimtab"
# What Pillow raises on files that are damaged.
_DAMAGED = (OSError, ValueError, SyntaxError, EOFError, IndexError, struct.error)


def register() -> None:
    """Let vLLM know the connector by the name that its variable has."""
    MEDIA_CONNECTOR_REGISTRY.register(_CONNECTOR)(StrictConnector)


def set_defaults(environment: MutableMapping[str, str]) -> None:
    """Make ours the defaults of vLLM's variables; what is set stays."""
    environment.setdefault("VLLM_MEDIA_CONNECTOR", _CONNECTOR)
    environment.setdefault("VLLM_MEDIA_URL_ALLOW_REDIRECTS", "0")
    environment.setdefault("VLLM_MAX_IMAGE_PIXELS", str(MAX_PIXELS))


class StrictImages(ImageMediaIO):
    """vLLM's decoder for few formats."""

    def get_max_bytes(self) -> int:
        """The most bytes of a file."""
        return MAX_BYTES

    def load_bytes(self, data: bytes) -> MediaWithBytes[Image.Image]:
        """Decode a file, of an animation the first picture."""
        check(data)
        try:
            return super().load_bytes(data)
        except _DAMAGED as error:
            raise _refused("is damaged and cannot be decoded") from error


def check(data: bytes) -> None:
    """Refuse a file by its size, format and pixels, before it is decoded.

    Raises:
        VLLMValidationError: says what is allowed.
    """
    if len(data) > MAX_BYTES:
        raise _refused(f"has {len(data)} bytes; at most {MAX_BYTES} are allowed")
    limit = envs.VLLM_MAX_IMAGE_PIXELS
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
    except UnidentifiedImageError:
        raise _refused("is in none of the formats PNG, JPEG, WebP and GIF") from None
    except Image.DecompressionBombError:
        raise _refused(f"has too many pixels; at most {limit} are allowed") from None
    except _DAMAGED as error:
        raise _refused("is damaged and cannot be decoded") from error
    if limit > 0 and width * height > limit:
        raise _refused(
            f"has {width} x {height} pixels; at most {limit} are allowed "
            "(VLLM_MAX_IMAGE_PIXELS of the server)"
        )


class StrictConnector(MediaConnector):
    """vLLM's connector, which fetches from nowhere unless told from where."""

    def fetch_image(self, image_url: str, *, image_mode: str | None = "RGB") -> Any:  # noqa: ANN401
        """Load an image."""
        self._check_url(image_url)
        try:
            return self.load_from_url(
                image_url, self._decoder(image_mode), fetch_timeout=envs.VLLM_IMAGE_FETCH_TIMEOUT
            )
        except (ValueError, NotImplementedError) as error:
            raise _refused(f"cannot be read: {error}") from error

    async def fetch_image_async(self, image_url: str, *, image_mode: str | None = "RGB") -> Any:  # noqa: ANN401
        """Load an image."""
        self._check_url(image_url)
        try:
            return await self.load_from_url_async(
                image_url, self._decoder(image_mode), fetch_timeout=envs.VLLM_IMAGE_FETCH_TIMEOUT
            )
        except (ValueError, NotImplementedError) as error:
            raise _refused(f"cannot be read: {error}") from error

    def _decoder(self, image_mode: str | None) -> StrictImages:
        given = self.media_io_kwargs.get("image", {})
        return StrictImages(**({"image_mode": image_mode} | given))

    def _check_url(self, url: str) -> None:
        scheme = url.partition(":")[0].lower()
        if scheme not in ("data", "http", "https", "file"):
            raise _refused("is no URL; send it as data:image/png;base64,...")
        if scheme == "file" and self.allowed_local_media_path is None:
            raise _refused(
                "is a file of the server, which are not read unless it is started with "
                "--allowed-local-media-path; send it as data:image/png;base64,..."
            )

    def _assert_url_in_allowed_media_domains(self, url_spec: Any) -> None:  # noqa: ANN401 - urllib3's
        """vLLM's own check, which lets every host pass where none is named."""
        if not self.allowed_media_domains:
            raise _refused(
                "is on another host, and none is fetched from unless the server is started with "
                "--allowed-media-domains; send it as data:image/png;base64,..."
            )
        super()._assert_url_in_allowed_media_domains(url_spec)


def _refused(why: str) -> VLLMValidationError:
    return VLLMValidationError(f"the image {why}", parameter="image_url")
