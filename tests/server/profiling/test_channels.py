"""Channels planted in made-up streams."""

import numpy as np
import pytest

from server.profiling.channels import NoSinks, Seen, find

TOKENS, WIDTH, LAYERS = 40, 64, 4
IMAGES = np.arange(TOKENS) // 16 == 0


def stream(rng, sinks, channels, size):
    """One layer: root mean squares of noise, and at sinks one or more channels far above them."""
    scaled = np.abs(rng.standard_normal((TOKENS, WIDTH))).astype(np.float32)
    scaled[np.ix_(sinks, channels)] = size + rng.random((len(sinks), len(channels)))
    return scaled


def prompts(sinks=(0, 5, 30), channels=(7, 50), size=30.0, count=3, layers=LAYERS):
    """Prompts whose first 16 tokens are an image; `size` by layer where it is a list."""
    sizes = size if isinstance(size, list) else [size] * layers

    def look():
        rng = np.random.default_rng(0)
        for _ in range(count):
            yield Seen([stream(rng, [*sinks], [*channels], each) for each in sizes], IMAGES)

    return look


def test_planted_channels_are_found_and_tau_is_between():
    found = find(prompts(), peak=10)

    assert found.sink_dims == (7, 50)
    assert 5 < found.tau < 30


def test_tau_is_the_geometric_mean_of_what_it_parts():
    def look():
        scaled = np.full((TOKENS, WIDTH), 2, np.float32)
        scaled[3, 9] = 32
        yield Seen([scaled] * 2, IMAGES)

    found = find(look, peak=10)

    assert (found.sink_dims, found.tau) == ((9,), 8.0)
    assert "Peaks are apart between 2 and 32." in found.remarks[0]


def test_a_given_tau_is_kept_and_what_it_makes_sinks_is_told():
    found = find(prompts(sinks=(0, 5, 6, 30)), peak=10, tau=25.0)

    assert found.tau == 25.0
    assert "first token is a sink in 100% of layers and prompts" in found.remarks[1]
    assert "3.0 sinks in images and 1.0 elsewhere" in found.remarks[1]


def test_a_channel_has_to_stand_out_in_most_layers():
    look = prompts(size=[0.5, 30, 0.5, 30])

    with pytest.raises(NoSinks, match="by 10 root mean squares in most layers; a lower --peak"):
        find(look, peak=10)
    assert find(prompts(size=[0.5, 30, 30, 30]), peak=10).sink_dims == (7, 50)


def test_a_channel_that_is_large_everywhere_marks_nothing():
    def look():
        for seen in prompts()():
            layers = [scaled.copy() for scaled in seen.layers]
            for scaled in layers:
                scaled[:, 20] = 12
                scaled[2, 20] = 30
            yield Seen(layers, seen.images)

    assert find(look, peak=10).sink_dims == (7, 50)


def test_a_lower_peak_finds_more():
    look = prompts(size=8.0)

    with pytest.raises(NoSinks):
        find(look, peak=10)
    assert find(look, peak=6).sink_dims == (7, 50)


def test_peaks_that_are_not_far_apart_are_told():
    near = find(prompts(size=5), peak=4)
    far = find(prompts(), peak=4)

    assert any("not far: look at receipts" in remark for remark in near.remarks)
    assert not any("look at receipts" in remark for remark in far.remarks)


def test_sinks_outside_images_alone_are_told():
    found = find(prompts(sinks=(17, 30)), peak=10)

    assert found.remarks[-1] == "No image token is a sink: VAR has nothing to do."
    assert "first token is a sink in 0% of" in found.remarks[-2]


def test_every_token_a_sink_of_some_channel():
    def look():
        scaled = np.zeros((TOKENS, 4), np.float32)
        for channel in range(4):
            scaled[channel * 10 : channel * 10 + 10, channel] = 20
        yield Seen([scaled], IMAGES)

    found = find(look, peak=10)

    assert (found.sink_dims, found.tau) == ((0, 1, 2, 3), 20.0)
