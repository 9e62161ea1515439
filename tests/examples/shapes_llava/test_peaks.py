import torch

from examples.shapes_llava.peaks import Layer, line


def test_a_line_tells_the_channels_and_who_is_beyond():
    ratios = torch.ones(1, 4, 8)
    ratios[0, 0, 5], ratios[0, 2, 5], ratios[0, 0, 1] = 9.0, 8.0, 3.0
    is_image = torch.tensor([False, True, True, False])

    told = line(Layer(ratios, (0.25, 0.5), 0.125), is_image, threshold=6.0)

    assert "channels 5 at 9.0, 1 at 3.0" in told
    assert "image tokens 50.0%, other text 0.0%" in told
    assert "image 0.25, text 0.50" in told
    assert "image tokens 0.0%" in line(Layer(ratios, (0, 0), 0), is_image, 6.0, named=[2])
