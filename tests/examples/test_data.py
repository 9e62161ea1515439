"""The evaluation sets are what their script makes, balanced, and not to be told by one word."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from server.evaluation.samples import read

DATA = Path(__file__).parents[2] / "examples" / "data"
SETS = ("sentiment", "topic", "reading")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    subprocess.run([sys.executable, DATA / "make.py", "--out", folder], check=True)
    return folder


@pytest.mark.parametrize("name", SETS)
def test_the_files_are_what_the_script_makes(made, name):
    file = f"{name}.jsonl"
    assert (DATA / file).read_bytes() == (made / file).read_bytes()


@pytest.mark.parametrize("name", SETS)
def test_answers_come_equally_often(name):
    data = read(DATA / f"{name}.jsonl")
    for split, size in (("search", 160), ("report", 240)):
        samples = data.part(split)
        answers = Counter(sample.answer for sample in samples)
        assert len(samples) == size
        assert set(answers.values()) == {size // len(samples[0].choices)}


@pytest.mark.parametrize("name", SETS)
def test_items_are_distinct(name):
    samples = read(DATA / f"{name}.jsonl").samples
    assert len({sample.content for sample in samples}) == len(samples) == 400


@pytest.mark.parametrize(("name", "most"), [("sentiment", 0.65), ("topic", 0.4), ("reading", 0.6)])
def test_no_single_word_tells_the_answer(name, most):
    samples = read(DATA / f"{name}.jsonl").samples
    texts = [set(re.findall(r"\w+", sample.prompt.lower())) for sample in samples]
    answers = [sample.answer for sample in samples]
    # A word in fewer items than this moves the share by less than the bounds leave.
    common = [word for word, count in Counter(w for t in texts for w in t).items() if count > 10]
    best = max(share(answers, [word in text for text in texts]) for word in common)
    assert best < most


def share(answers, present):
    """Right answers of who answers by the presence of a word as well as can be."""
    right = 0
    for side in (True, False):
        counts = Counter(a for a, p in zip(answers, present, strict=True) if p == side)
        right += max(counts.values(), default=0)
    return right / len(answers)
