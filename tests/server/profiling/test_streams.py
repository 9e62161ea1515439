"""Channels that are planted in a model are found in it, through transformers."""

import json
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, GitConfig, LlamaConfig, LlavaForConditionalGeneration

from calibrators.reference import residual_peaks
from server.evaluation.command import Unusable
from server.evaluation.samples import Sample
from server.models import VISION_MODEL
from server.profiling import streams
from server.profiling.channels import NoSinks
from tests.fixtures import llava
from tests.integration.vision_cases import data_url, picture

BRIGHT = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return llava.build(tmp_path_factory.mktemp("llava") / "model")


@pytest.fixture
def make_sample():
    """A question about a picture with bright patches."""

    def make(url=None, before=(), text="What is this. A licence."):
        image = {"type": "image_url", "image_url": {"url": url or data_url(picture(3, BRIGHT))}}
        asked = {"role": "user", "content": [image, {"type": "text", "text": text}]}
        return Sample("one", None, (*before, asked), ("yes", "no"), "yes")

    return make


@pytest.fixture
def bars():
    """Progress that was shown."""
    return []


@pytest.fixture
def channels(folder, bars):
    def find(*samples, name=None, peak=10.0, tau=None):
        @contextmanager
        def bar(title, total, done):
            bars.append([title, total, done])
            yield lambda: bars.append("advanced")

        return streams.channels(str(name or folder), samples, peak, tau, bar)

    return find


def test_planted_channels_are_found_and_tau_is_between(channels, make_sample, bars):
    found = channels(make_sample(), make_sample(data_url(picture(4, BRIGHT))))

    assert found.sink_dims == llava.SINK_CHANNELS
    assert 3 < found.tau < 20
    # The first token and two full stops in each prompt.
    assert f"{BRIGHT:.1f} sinks in images and 3.0 elsewhere" in found.remarks[1]
    assert bars == [["observe", 4, 0], *["advanced"] * 4]


def test_a_file_is_read_and_an_earlier_message_counts(channels, make_sample, tmp_path):
    picture(3, BRIGHT).save(tmp_path / "one.png")
    earlier = {"role": "system", "content": "Stop. Stop. Stop."}
    found = channels(make_sample((tmp_path / "one.png").as_uri(), (earlier,)))

    assert f"{BRIGHT:.1f} sinks in images and 6.0 elsewhere" in found.remarks[1]


def test_peaks_are_those_of_the_reference(folder, make_sample):
    model, processor = streams._loaded(str(folder))
    seen = streams._seen(model, processor, make_sample())
    expected = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    states = []
    for layer in expected.model.language_model.layers[2:-1]:
        layer.register_forward_pre_hook(lambda _, args: states.append(args[0][0]))
    text = llava.IMAGE + "\nWhat is this. A licence. "
    inputs = AutoProcessor.from_pretrained(folder)(
        images=picture(3, BRIGHT),
        text=f"<s>USER: {text}ASSISTANT:",
        add_special_tokens=False,
        return_tensors="pt",
    )
    with torch.no_grad():
        expected(**inputs)

    assert seen.images.sum() == llava.IMAGE_TOKENS
    for scaled, state in zip(seen.layers, states, strict=True):
        peaks = residual_peaks(state, torch.tensor(llava.SINK_CHANNELS))
        np.testing.assert_allclose(
            scaled[:, [*llava.SINK_CHANNELS]].max(1), peaks, rtol=1e-4, atol=1e-4
        )


def test_an_embedded_model_is_known_by_its_name(channels, make_sample):
    with pytest.raises(NoSinks, match="no channel has tokens"):
        channels(make_sample(), name=VISION_MODEL)


def test_a_model_of_text_alone(channels, make_sample, tmp_path):
    LlamaConfig().save_pretrained(tmp_path)

    with pytest.raises(Unusable, match="takes no images"):
        channels(make_sample(), name=tmp_path)


def test_a_model_without_a_token_for_images(channels, make_sample, tmp_path):
    GitConfig().save_pretrained(tmp_path)

    with pytest.raises(Unusable, match="no token for images; --sink-dims"):
        channels(make_sample(), name=tmp_path)


def test_a_folder_without_a_model(channels, make_sample, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard-of"}))

    with pytest.raises(Unusable, match="transformers cannot load it: "):
        channels(make_sample(), name=tmp_path)


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("https://127.0.0.1/one.png", "neither a data: nor a file: URL"),
        ("file:///no/such/file.png", "No such file"),
        ("data:image/png;base64,AAAA", "cannot identify image"),
        ("one.png", "neither a data: nor a file: URL"),
    ],
    ids=["web", "missing", "no-image", "no-scheme"],
)
def test_an_image_that_cannot_be_read(channels, make_sample, url, told):
    with pytest.raises(Unusable, match=rf"sample one cannot be looked at: .*{told}"):
        channels(make_sample(url))


def test_layers_are_those_that_var_calibrates_by_default():
    assert [*streams._looked_at(32)] == [*range(2, 31)]
    assert [*streams._looked_at(3)] == [0, 1, 2]
