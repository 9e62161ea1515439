import pytest

from server.evaluation.api import ApiFailure
from server.evaluation.scoring import Generate, Logprob, continuations

pytestmark = pytest.mark.anyio
GAMMA = {"method": "zerotuning", "gamma": 0.5}


@pytest.mark.parametrize("chat", [None, "Is it?"])
async def test_what_is_written_is_matched(connect, make_sample, chat):
    fake, api = await connect(prefers="No, it is not")
    verdict = await Generate(api, max_tokens=3).ask(make_sample(chat=chat), GAMMA)
    assert (verdict.choice, verdict.text, verdict.logprobs) == (" no", "No, it is not", None)
    assert [receipt.digest for receipt in verdict.receipts] == ["0123456789ab"]
    ((path, body),) = fake.requests
    assert path == ("/v1/chat/completions" if chat else "/v1/completions")
    assert body["max_tokens"] == 3
    assert ("messages" in body) == bool(chat)


async def test_what_names_no_choice_is_no_answer(connect, make_sample):
    _, api = await connect(prefers="perhaps")
    verdict = await Generate(api).ask(make_sample(), None)
    assert (verdict.choice, verdict.receipts) == (None, ())


@pytest.mark.parametrize(
    ("chat", "choices", "prefers"),
    [(None, (" yes", " no"), " no"), ("Is it?", ("yes", "no"), "no")],
)
async def test_single_tokens_are_weighed_in_one_request(
    connect, make_sample, chat, choices, prefers
):
    fake, api = await connect(prefers=prefers)
    sample = make_sample(chat=chat, choices=choices, answer=choices[0])
    scorer = Logprob(api)
    verdict = await scorer.ask(sample, GAMMA)
    assert verdict.choice == prefers
    assert verdict.logprobs == {choices[0]: -2.0, choices[1]: -1.0}
    assert len(verdict.receipts) == 1
    ((path, body),) = fake.requests
    assert path == ("/v1/chat/completions" if chat else "/v1/completions")
    assert body["max_tokens"] == 1
    assert sorted(body["logprob_token_ids"]) == sorted(map(fake.token, choices))
    await scorer.ask(sample, None)
    assert len(fake.requests) == 2


@pytest.mark.parametrize("chat", [None, "Which?"])
async def test_longer_choices_are_summed_over_their_tokens(connect, make_sample, chat):
    space = "" if chat else " "
    choices = [space + words for words in ("light blue", "light red", "green", "light")]

    def prefers(text, calibration):
        return " red" if text.endswith("light") else f"{space}light"

    fake, api = await connect(prefers=prefers)
    sample = make_sample(chat=chat, prompt="Which?", choices=choices, answer=choices[0])
    verdict = await Logprob(api).ask(sample, None)
    assert verdict.logprobs == dict(zip(choices, [-3.0, -2.0, -2.0, -1.0], strict=True))
    assert verdict.choice == choices[3]
    first, second = fake.requests
    assert fake.text(second[1]) == fake.text(first[1]) + choices[3]


def test_requests_are_the_inner_nodes_of_the_trie():
    choices = {"a": (1,), "b": (2, 3), "c": (2, 4, 5), "d": (2,)}
    assert continuations(choices) == {(): (1, 2), (2,): (3, 4), (2, 4): (5,)}


async def test_a_choice_that_melts_into_the_prompt_is_told(connect, make_sample):
    _, api = await connect()
    sample = make_sample(prompt="Answer: ", choices=("yes", "no"), answer="yes")
    with pytest.raises(ApiFailure, match="'yes' does not begin with a token of its own"):
        await Logprob(api).ask(sample, None)


async def test_images_need_choices_of_one_token(connect, make_sample):
    image = [{"type": "image_url", "image_url": {"url": "data:,"}}]
    fake, api = await connect(prefers="no")
    sample = make_sample(chat=image, choices=("yes", "no"), answer="yes")
    assert (await Logprob(api).ask(sample, None)).choice == "no"
    assert fake.requests[0][1]["messages"][0]["content"] == image
    long = make_sample(id="two", chat=image, choices=("yes sir", "no"), answer="no")
    with pytest.raises(ApiFailure, match="with images, every choice"):
        await Logprob(api).ask(long, None)


async def test_a_log_probability_that_is_missing_is_a_failure(connect, make_sample):
    _, api = await connect(flaw="a token is missing")
    with pytest.raises(ApiFailure, match="the answer has no token_id:"):
        await Logprob(api).ask(make_sample(), None)
