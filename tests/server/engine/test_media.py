import asyncio
import base64
import io
import struct
import zlib
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from vllm import envs
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY

from server.engine import media
from server.engine.media import StrictConnector, check, set_defaults

RED = Image.new("RGB", (8, 6), (255, 0, 0))


def file(form="PNG", image=RED, **options):
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def url(data, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def png_of(width, height):
    """The head of a PNG, as a client might forge it."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    crc = struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + crc + b"\0\0\1\0IDAT"


@pytest.fixture
def fetch():
    """Fetch an image both ways; what vLLM's connection is asked for is an error."""

    def forbidden(*args, **kwargs):
        pytest.fail("a connection was made")

    connection = SimpleNamespace(get_bytes=forbidden, async_get_bytes=forbidden)

    def run(address, **options):
        connector = StrictConnector(connection=connection, **options)
        images = [
            connector.fetch_image(address).media,
            asyncio.run(connector.fetch_image_async(address)).media,
        ]
        assert images[0].tobytes() == images[1].tobytes()
        return images[0]

    return run


def refusal(fetch, address, **options):
    """The one message of both ways."""
    connector = StrictConnector(connection=None, **options)
    with pytest.raises(VLLMValidationError) as one:
        connector.fetch_image(address)
    with pytest.raises(VLLMValidationError) as other:
        asyncio.run(connector.fetch_image_async(address))
    assert str(one.value) == str(other.value)
    assert "0x" not in str(one.value)
    return str(one.value)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF"])
def test_what_browsers_show_is_decoded(fetch, form):
    image = fetch(url(file(form), f"image/{form.lower()}"))
    assert (image.mode, image.size) == ("RGB", (8, 6))
    assert image.getpixel((3, 3))[0] > 240 > 20 > image.getpixel((3, 3))[1]


def test_of_an_animation_the_first_picture_counts(fetch):
    blue = Image.new("RGB", (8, 6), (0, 0, 255))
    for form in ("GIF", "WEBP"):
        data = file(form, save_all=True, append_images=[blue])
        assert fetch(url(data)).getpixel((0, 0))[0] > 240


@pytest.mark.parametrize("form", ["BMP", "TIFF", "PPM", "ICO"])
def test_other_formats_are_refused(fetch, form):
    message = refusal(fetch, url(file(form, RED.resize((32, 32)))))
    assert "none of the formats PNG, JPEG, WebP and GIF" in message


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("http://example.org/a.png", "on another host, and none is fetched from"),
        ("HTTPS://10.0.0.1/a.png", "--allowed-media-domains"),
        ("http://[::1]:8000/metrics", "on another host"),
        ("file:///etc/passwd", "--allowed-local-media-path"),
        ("ftp://example.org/a.png", "is no URL"),
        ("gopher://example.org/a.png", "is no URL"),
        ("iVBORw0KGgo=", "is no URL"),
        ("", "is no URL"),
        ("data:image/png;base64", "cannot be read"),
        ("data:image/png,abc", "cannot be read: Only base64"),
        ("data:image/png;base64,@@@@", "cannot be read"),
        ("data:image/png;base64,", "none of the formats"),
        (url(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "none of the formats"),
        (url(file()[:50]), "is damaged"),
    ],
)
def test_anything_else_is_refused_with_the_reason(fetch, address, why):
    assert why in refusal(fetch, address)


def test_only_hosts_that_are_named_are_fetched_from(fetch):
    asked = []

    def answer(address, **options):
        asked.append((address, options["allow_redirects"], options["max_bytes"]))
        return file()

    connection = SimpleNamespace(get_bytes=answer)
    connector = StrictConnector(connection=connection, allowed_media_domains=["example.org"])
    assert connector.fetch_image("https://example.org/a.png").media.size == (8, 6)
    assert asked == [("https://example.org/a.png", envs.VLLM_MEDIA_URL_ALLOW_REDIRECTS, 32 << 20)]
    message = refusal(fetch, "https://example.com/a", allowed_media_domains=["example.org"])
    assert "allowed domains" in message


def test_files_are_read_where_a_folder_is_named(fetch, tmp_path):
    (tmp_path / "a.png").write_bytes(file())
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").write_bytes(file())
    options = {"allowed_local_media_path": str(folder)}
    assert fetch(f"file://{folder}/a.png", **options).size == (8, 6)
    assert "cannot be read" in refusal(fetch, f"file://{folder}/../a.png", **options)


@pytest.mark.parametrize("size", [(1 << 13, (1 << 12) + 1), (1 << 16, 1 << 16), (1 << 30, 1 << 30)])
def test_pixels_are_counted_before_they_are_decoded(fetch, monkeypatch, size):
    monkeypatch.setenv("VLLM_MAX_IMAGE_PIXELS", str(media.MAX_PIXELS))
    message = refusal(fetch, url(png_of(*size)))
    assert "pixels; at most 33554432 are allowed" in message


def test_files_are_measured_before_they_are_opened(monkeypatch):
    monkeypatch.setattr(media, "MAX_BYTES", 10)
    with pytest.raises(VLLMValidationError, match="at most 10 are allowed"):
        check(file())


@given(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF"]), st.data())
def test_damaged_files_are_refused_or_decoded(form, data):
    whole = bytearray(file(form))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = whole[: data.draw(st.integers(1, len(whole)))]
    try:
        image = StrictConnector(connection=None).fetch_image(url(bytes(cut)))
    except VLLMValidationError as error:
        assert str(error).startswith("the image ")
    else:
        assert image.media.mode == "RGB"


def test_defaults_give_way_to_what_is_set():
    environment = {"VLLM_MAX_IMAGE_PIXELS": "1000"}
    set_defaults(environment)
    assert environment == {
        "VLLM_MEDIA_CONNECTOR": "trimtab",
        "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",
        "VLLM_MAX_IMAGE_PIXELS": "1000",
    }


def test_vllm_finds_it_by_its_name():
    media.register()
    media.register()
    assert isinstance(MEDIA_CONNECTOR_REGISTRY.load("trimtab"), StrictConnector)
