import json

import pytest

from server.profiling.search import BASELINE, Candidate
from server.profiling.state import StateError, opened

HEADER = {"data": "abc", "seed": 0, "grid": (1.0, 2.0)}
HEAD = Candidate("head 3", {"method": "zerotuning", "gamma": 2.0, "heads": [3]})


@pytest.fixture
def begun(tmp_path):
    """A state with two measurements."""
    path = tmp_path / "state.jsonl"
    with opened(path, HEADER) as state:
        state.add("answers", HEAD, "a", {"accuracy": 1.0})
        state.add("answers", BASELINE, "a", {"accuracy": 0.0})
    return path


def test_measurements_are_there_again(begun):
    with opened(begun, HEADER) as state:
        assert len(state) == 2
        assert state.get("answers", HEAD, "a") == {"accuracy": 1.0}
        assert state.get("answers", BASELINE, "a") == {"accuracy": 0.0}
        assert state.get("answers", HEAD, "b") is None
        assert state.get("entropy", HEAD, "a") is None


def test_a_measurement_is_in_the_file_at_once(tmp_path):
    path = tmp_path / "state.jsonl"
    with opened(path, HEADER) as state:
        state.add("answers", HEAD, "a", {"accuracy": 1.0})
        assert json.loads(path.read_text().splitlines()[1])["sample"] == "a"


def test_a_line_that_was_cut_off_is_dropped_and_written_anew(begun):
    whole = begun.read_bytes()
    begun.write_bytes(whole[:-5])
    with opened(begun, HEADER) as state:
        assert state.get("answers", BASELINE, "a") is None
        state.add("answers", BASELINE, "a", {"accuracy": 0.0})
    assert begun.read_bytes() == whole


def test_a_header_that_was_cut_off_begins_anew(begun):
    begun.write_text('{"format": 1, "da')
    with opened(begun, HEADER) as state:
        assert len(state) == 0
    assert json.loads(begun.read_text())["data"] == "abc"


@pytest.mark.parametrize(
    ("header", "told"),
    [
        ({**HEADER, "seed": 1}, "another seed: 0 there, 1 here"),
        ({**HEADER, "data": "def"}, 'another data: "abc" there, "def" here'),
        ({**HEADER, "more": True}, "another more: null there, true here"),
        ({"data": "abc", "seed": 0}, "another grid"),
    ],
)
def test_another_search_is_refused(begun, header, told):
    before = begun.read_bytes()
    with pytest.raises(StateError, match=told), opened(begun, header):
        pass
    assert begun.read_bytes() == before


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("no JSON\n", ":1: not JSON"),
        ("[]\n", "the first line"),
        ('{"format": 1, "data": "abc", "seed": 0, "grid": [1.0, 2.0]}\n{}\n', "no measurement"),
        ('{"format": 1, "data": "abc", "seed": 0, "grid": [1.0, 2.0]}\n[\n', ":2: not JSON"),
    ],
)
def test_files_that_are_no_state(tmp_path, text, told):
    path = tmp_path / "state.jsonl"
    path.write_text(text)
    with pytest.raises(StateError, match=told), opened(path, HEADER):
        pass
    assert path.read_text() == text


def test_a_state_in_use_is_refused(begun):
    with opened(begun, HEADER):
        with pytest.raises(StateError, match="another search is using it"), opened(begun, HEADER):
            pass


def test_a_folder_is_no_state(tmp_path):
    with pytest.raises(StateError, match="directory"), opened(tmp_path, HEADER):
        pass
