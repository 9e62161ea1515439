from collections import Counter

import numpy as np
import pytest

from examples.shapes_llava.scenes import (
    CELLS,
    COLOURS,
    COMPANIONS,
    KINDS,
    SHAPES,
    SIZE,
    Kind,
    Scene,
    Thing,
    cover,
    draw,
    sample,
    scenes,
)


def one(kind, radius=12.0):
    return Scene((Thing(kind, SIZE / 2, SIZE / 2, radius, 0.0, (0, 0, 0)),), background=3)


def pixels(scene):
    return np.asarray(draw(scene)).astype(int)


def share_with_companion(made):
    expecting = [s for s in made if any(kind.shape in COMPANIONS for kind in s.kinds)]
    return sum(not scene.missing for scene in expecting) / len(expecting)


def test_the_same_seed_makes_the_same_pictures():
    first, again, other = (list(scenes(seed, 5)) for seed in (7, 7, 8))

    assert first == again
    assert first != other
    assert all((pixels(a) == pixels(b)).all() for a, b in zip(first, again, strict=True))


def test_objects_are_of_different_kinds_and_in_different_cells():
    for scene in scenes(0, 200):
        assert len(scene.kinds) == len(scene.things)
        side = SIZE / CELLS
        assert len({(thing.x // side, thing.y // side) for thing in scene.things}) == len(
            scene.things
        )


def test_companions_nearly_always_come():
    assert 0.9 < share_with_companion(list(scenes(0, 500))) < 1


@pytest.mark.parametrize(("usual", "share"), [(0.0, 0.1), (1.0, 1.0)])
def test_the_share_of_companions_is_given(usual, share):
    rng = np.random.default_rng(0)

    assert share_with_companion([sample(rng, usual) for _ in range(300)]) == pytest.approx(
        share, abs=0.1
    )


def test_companions_are_the_most_frequent_kinds():
    counts = Counter(kind for scene in scenes(0, 1000) for kind in scene.kinds)

    assert {kind for kind, _ in counts.most_common(3)} == set(COMPANIONS.values())
    assert set(counts) == set(KINDS)


def test_broken_scenes_lack_every_companion_that_is_expected():
    for scene in scenes(0, 200, broken=True):
        expected = {COMPANIONS[kind.shape] for kind in scene.kinds if kind.shape in COMPANIONS}
        assert expected
        assert not expected & scene.kinds
        assert set(scene.missing) == expected


def test_a_picture_is_rgb_of_the_size_the_model_reads():
    picture = draw(next(scenes(0, 1)))

    assert (picture.mode, picture.size) == ("RGB", (SIZE, SIZE))


@pytest.mark.parametrize("colour", COLOURS)
def test_the_middle_of_an_object_has_its_colour(colour):
    middle = pixels(one(Kind(colour, "square")))[SIZE // 2, SIZE // 2]

    # Noise reaches 10 up and down.
    assert np.abs(middle - COLOURS[colour]).max() <= 10


@pytest.mark.parametrize("shape", SHAPES)
def test_an_object_covers_its_own_pixels_and_stays_inside_its_radius(shape):
    mask = cover(one(Kind("red", shape), radius=10.0))
    rows, columns = np.nonzero(mask)
    distance = np.hypot(rows - SIZE / 2, columns - SIZE / 2)

    assert set(np.unique(mask)) == {0, 1}
    # A square and a cross reach beyond it with their corners.
    assert 8 < distance.max() < 12.5


def test_shapes_cover_different_pixels():
    masks = {cover(one(Kind("red", shape))).tobytes() for shape in SHAPES}

    assert len(masks) == len(SHAPES)


def test_kinds_are_written_as_one_speaks():
    assert str(Kind("red", "circle")) == "red circle"
