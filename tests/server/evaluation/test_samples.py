import hashlib
import json

import pytest

from server.evaluation.samples import DataError, draw, read

QUESTION = {"prompt": "Is it?", "answer": "yes", "choices": ["yes", "no"]}
CHAT = {
    "messages": [{"role": "user", "content": "Is it?"}],
    "answer": " a",
    "labels": [" a", " b"],
}


@pytest.fixture
def write(tmp_path):
    """A file whose lines are given as objects or as text."""

    def make(*lines):
        file = tmp_path / "data.jsonl"
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        file.write_text("\n".join(texts), encoding="utf-8")
        return file

    return make


def numbered(count, **fields):
    return [QUESTION | {"prompt": f"Question {number}"} | fields for number in range(count)]


def test_a_text_with_choices_is_written_on(write):
    file = write("", QUESTION, "  ", QUESTION | {"id": "last", "prompt": "Then?"})
    data = read(file)
    assert [sample.id for sample in data.samples] == ["line-2", "last"]
    assert data.samples[1].prompt == "Then?"
    assert data.samples[0].choices == ("yes", "no")
    assert (data.name, data.scoring) == ("data.jsonl", "generate")
    assert data.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_chat_with_labels_is_weighed(write):
    parts = [{"type": "image_url", "image_url": {"url": "data:,"}}]
    seen = CHAT | {"messages": [{"role": "user", "content": parts, "name": "Ann"}]}
    data = read(write(CHAT, seen))
    assert data.scoring == "logprob"
    assert data.samples[0].prompt is None
    assert data.samples[0].messages == ({"role": "user", "content": "Is it?"},)
    assert data.samples[1].messages[0]["content"] == parts
    assert data.samples[1].messages[0]["name"] == "Ann"


def test_a_line_separator_inside_a_string_ends_no_line(write):
    line = json.dumps(QUESTION | {"prompt": "one\u2028two\x85three"}, ensure_ascii=False)
    assert read(write(line)).samples[0].prompt == "one\u2028two\x85three"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON: "),
        ("[1]", "valid dictionary"),
        ("null", "valid dictionary"),
        ("[" * 100_000, "nested too deeply"),
        ('{"answer": "a", "answer": "b"}', "a name occurs twice"),
        (QUESTION | {"promt": "x"}, "promt: Extra inputs"),
        (QUESTION | {"answer": 1}, "answer: Input should be a valid string"),
        (QUESTION | {"answer": "maybe"}, "'maybe' is not among the choices ['yes', 'no']"),
        (QUESTION | {"answer": "Yes"}, "'Yes' is not among"),
        (QUESTION | {"prompt": ""}, "prompt: String should have at least 1"),
        (QUESTION | {"prompt": None}, "either prompt or messages is needed"),
        (QUESTION | {"messages": CHAT["messages"]}, "either prompt or messages is needed"),
        (QUESTION | {"messages": []}, "messages: List should have at least 1"),
        (QUESTION | {"labels": ["yes", "no"]}, "either choices or labels is needed"),
        ({"prompt": "x", "answer": "yes"}, "either choices or labels is needed"),
        (QUESTION | {"choices": ["yes"]}, "at least two"),
        (QUESTION | {"choices": ["yes", "Yes!"]}, "differ in nothing but case"),
        (QUESTION | {"choices": ["yes", "?"]}, "neither letters nor digits"),
        (QUESTION | {"split": "train"}, "split: Input should be 'search' or 'report'"),
        (CHAT | {"messages": [{"role": "user"}]}, "messages.0.content: Field required"),
    ],
)
def test_a_wrong_line_is_named_with_the_reason(write, line, reason):
    file = write(QUESTION, "", line)
    with pytest.raises(DataError) as caught:
        read(file)
    message = str(caught.value)
    assert message.startswith(f"{file}:3: ")
    assert reason in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ([QUESTION, CHAT], ":2: choices and labels in one file"),
        ([QUESTION | {"split": "search"}, QUESTION], ":2: split is given on some lines"),
        (numbered(2, id="same"), ":2: the id 'same' occurs twice"),
        ([QUESTION | {"id": "line-2"}, QUESTION], ":2: the id 'line-2' occurs twice"),
        (
            [QUESTION | {"split": "search"}, QUESTION | {"split": "report"}],
            ":2: the same input is in the other split",
        ),
        (["", "  "], ": no samples"),
        ([], ": no samples"),
    ],
)
def test_lines_that_do_not_go_together_are_refused(write, lines, reason):
    with pytest.raises(DataError) as caught:
        read(write(*lines))
    assert reason in str(caught.value)


def test_what_is_no_file_and_no_text_is_told(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.jsonl: No such file"):
        read(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match="directory"):
        read(tmp_path)
    file = tmp_path / "latin.jsonl"
    file.write_bytes(b"\n\xe9\n")
    with pytest.raises(DataError, match=r"latin\.jsonl:2: not UTF-8"):
        read(file)


def test_a_fixed_split_is_kept(write):
    data = read(write(*numbered(3, split="search"), QUESTION | {"split": "report"}))
    assert data.part("search", seed=1) == data.part("search", seed=2) == data.samples[:3]
    assert data.part("report") == data.samples[3:]
    assert data.part("all") == data.samples


def test_a_split_that_is_drawn_halves_the_samples(write):
    data = read(write(*numbered(40)))
    search, report = data.part("search", seed=7), data.part("report", seed=7)
    assert len(search) == len(report) == 20
    assert sorted(search + report, key=data.samples.index) == list(data.samples)
    assert list(search) == sorted(search, key=data.samples.index)
    assert data.part("search", seed=7) == search
    assert data.part("search", seed=8) != search


def test_equal_inputs_stay_together(write):
    data = read(write(*numbered(10), *numbered(10)))
    search, report = ({s.content for s in data.part(side, seed=3)} for side in ("search", "report"))
    assert not search & report
    assert len(search | report) == 10


def test_an_empty_split_is_an_error(write):
    with pytest.raises(DataError, match=r"data\.jsonl: the split 'report' has no samples"):
        read(write(*numbered(2, split="search"))).part("report")


def test_a_limit_draws_by_the_seed_and_keeps_the_order(write):
    samples = read(write(*numbered(30))).samples
    drawn = draw(samples, 5, seed=1)
    assert len(drawn) == 5
    assert list(drawn) == sorted(drawn, key=samples.index)
    assert draw(samples, 5, seed=1) == drawn
    assert draw(samples, 5, seed=2) != drawn
    assert draw(samples, None) == draw(samples, 99) == samples


SEEN = {"type": "image_url", "image_url": {"url": "data:,"}}


def test_chats_with_images(write):
    second = [{"role": "system", "content": "Look."}, {"role": "user", "content": [SEEN]}]
    data = read(write(CHAT | {"messages": second}), images=True)
    assert data.samples[0].messages[1]["content"] == [SEEN]


@pytest.mark.parametrize(
    "line",
    [
        QUESTION,
        CHAT,
        CHAT | {"messages": [{"role": "user", "content": [{"type": "text", "text": "Is it?"}]}]},
        CHAT | {"messages": [{"role": "user", "content": [SEEN | {"image_url": "data:,"}]}]},
        CHAT | {"messages": [{"role": "user", "content": [SEEN | {"image_url": {}}]}]},
    ],
    ids=["text", "chat", "parts", "no object", "no url"],
)
def test_a_line_without_an_image_is_refused_where_one_is_needed(write, line):
    seen = CHAT | {"messages": [{"role": "user", "content": [SEEN]}]}
    file = write(
        seen
        | {"labels": line.get("labels"), "choices": line.get("choices")}
        | {"answer": line["answer"]},
        line,
    )
    assert len(read(file).samples) == 2
    with pytest.raises(DataError, match=r"data\.jsonl:2: no message has a part with an image_url"):
        read(file, images=True)
