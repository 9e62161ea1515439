import asyncio
import json
import math

import httpx
import pytest

from server.evaluation.api import Api
from server.evaluation.samples import Sample
from server.evaluation.scoring import Verdict
from server.profiling.questions import TOP, Answers, Entropy, Sinks, entropy

TEXT = Sample("t", "How?", (), ("yes", "no"), "yes")
CHAT = Sample("c", None, ({"role": "user", "content": "How?"},), ("yes", "no"), "yes")
ACT = {"method": "act", "heads": {"2": [1]}}
HALVES = math.log(0.5)


class FixedScorer:
    def __init__(self, verdict):
        self._verdict = verdict

    async def ask(self, sample, calibration):
        return self._verdict


@pytest.fixture
def ask():
    """Asks a question of a server that gives one document; returns values and the request."""

    def asked(question, sample, calibration, document):
        bodies = []

        def handle(request):
            bodies.append((request.url.path, json.loads(request.content)))
            return httpx.Response(200, json=document)

        async def go():
            transport = httpx.MockTransport(handle)
            async with httpx.AsyncClient(transport=transport, base_url="http://x") as http:
                return await question(Api(http, "m", {}, frozenset({"act"}))).ask(
                    sample, calibration
                )

        return asyncio.run(go()), bodies[0]

    return asked


def values_of(verdict):
    return asyncio.run(Answers(FixedScorer(verdict)).ask(TEXT, None))


def test_a_right_answer_a_wrong_one_and_none():
    right, wrong, none = (Verdict(choice, "", None, ()) for choice in ("yes", "no", None))

    assert values_of(right) == {"accuracy": 1.0, "valid": 1.0}
    assert values_of(wrong) == {"accuracy": 0.0, "valid": 1.0}
    assert values_of(none) == {"accuracy": 0.0, "valid": 0.0}


def test_the_margin_is_that_of_the_right_choice_over_the_best_other_one():
    verdict = Verdict("no", None, {"yes": -3.0, "no": -1.0, "maybe": -2.0}, ())

    assert values_of(verdict) == {"accuracy": 0.0, "valid": 1.0, "margin": -2.0}


def test_entropy_takes_what_is_left_for_one_token():
    assert entropy([0.0]) == pytest.approx(0)
    assert entropy([HALVES, HALVES]) == pytest.approx(math.log(2))
    assert entropy([HALVES]) == pytest.approx(math.log(2))
    assert entropy([math.log(0.25)] * 3 + [-9999.0]) == pytest.approx(math.log(4))
    # Rounded probabilities may sum to more than 1.
    assert entropy([1e-7]) == pytest.approx(0, abs=1e-6)


def test_entropy_of_a_chat(ask):
    top = [{"token": "a", "logprob": HALVES}, {"token": "b", "logprob": HALVES}]
    document = {"choices": [{"logprobs": {"content": [{"top_logprobs": top}]}}]}
    values, (path, body) = ask(Entropy, CHAT, None, document)

    assert values == {"entropy": pytest.approx(math.log(2))}
    assert path == "/v1/chat/completions"
    assert (body["max_tokens"], body["logprobs"], body["top_logprobs"]) == (1, True, TOP)


def test_entropy_of_a_text(ask):
    document = {"choices": [{"logprobs": {"top_logprobs": [{"token_id:1": 0.0}]}}]}
    values, (path, body) = ask(Entropy, TEXT, None, document)

    assert values == {"entropy": pytest.approx(0)}
    assert path == "/v1/completions"
    assert (body["logprobs"], body["return_tokens_as_token_ids"]) == (TOP, True)


@pytest.mark.parametrize(("statistics", "mass"), [({"sink_mass_before": 0.25}, 0.25), ({}, 0.0)])
def test_sinks_are_those_of_the_receipt(ask, statistics, mass):
    applied = [{"method": "act", "prompt_tokens": 1, "statistics": statistics}]
    receipt = {"digest": "d", "applied": applied}
    document = {"choices": [{"message": {"content": "x"}}], "calibration": receipt}
    values, (_, body) = ask(Sinks, CHAT, ACT, document)

    assert values == {"sink_mass": mass}
    assert body["calibration"] == ACT
