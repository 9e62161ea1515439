import asyncio

import httpx
import pytest

from benchmarks.load import (
    LoadError,
    Pictures,
    Prompts,
    Round,
    Shape,
    bodies,
    calibration_seconds,
    play,
)

CALIBRATION = {"method": "zerotuning", "gamma": 0.5}
METRICS = """\
# TYPE trimtab_calibration_seconds histogram
trimtab_calibration_seconds_count{calibrator="zerotuning"} 4.0
trimtab_calibration_seconds_sum{calibrator="zerotuning"} 1.25
"""


def client_answering(answer):
    def handle(request):
        return answer if isinstance(answer, httpx.Response) else httpx.Response(200, json=answer)

    return httpx.AsyncClient(base_url="http://server", transport=httpx.MockTransport(handle))


def play_one(answer, calibration=None):
    async def run():
        async with client_answering(answer) as client:
            return await play(client, bodies(Shape(1, 5, 3), Prompts(2000), calibration))

    return asyncio.run(run())


def usage(prompt, completion):
    return {"usage": {"prompt_tokens": prompt, "completion_tokens": completion}}


def test_prompts_have_their_length_and_stay_inside_the_vocabulary():
    prompt = Prompts(1010).draw(500)

    assert len(prompt) == 500
    assert set(prompt) <= set(range(1000, 1010))


def test_prompts_of_a_round_and_of_the_next_all_differ():
    prompts = Prompts(49152)
    drawn = [tuple(prompts.draw(16)) for _ in range(32)]

    assert len(set(drawn)) == 32


def test_bodies_fix_both_lengths_and_the_choice_of_tokens():
    (body,) = bodies(Shape(1, 7, 5), Prompts(2000), None)

    assert len(body["prompt"]) == 7
    assert body["max_tokens"] == body["min_tokens"] == 5
    assert body["ignore_eos"] is True
    assert body["temperature"] == 0
    assert "calibration" not in body


@pytest.mark.parametrize(
    ("share", "expected"), [(1.0, [1, 1, 1, 1]), (0.5, [0, 1, 0, 1]), (0.0, [0, 0, 0, 0])]
)
def test_calibrated_requests_are_spread_over_the_round(share, expected):
    requests = bodies(Shape(4, 2, 1, calibrated=share), Prompts(2000), CALIBRATION)

    assert [int("calibration" in body) for body in requests] == expected


def test_a_plain_round_of_a_mixed_shape_is_plain():
    requests = bodies(Shape(4, 2, 1, calibrated=0.5), Prompts(2000), None)

    assert not any("calibration" in body for body in requests)


def test_a_round_measures_each_request():
    played = play_one(usage(5, 3))

    assert len(played.latencies) == 1
    assert 0 < played.latencies[0] <= played.seconds


def test_mean_latency():
    assert Round(9.0, (1.0, 3.0)).mean_latency == 2.0


@pytest.mark.parametrize("answer", [usage(5, 2), usage(4, 3), httpx.Response(500, text="broken")])
def test_an_answer_that_is_not_what_was_asked_for_stops_the_measurement(answer):
    with pytest.raises(LoadError):
        play_one(answer)


def test_a_calibrated_request_without_a_receipt_stops_the_measurement():
    with pytest.raises(LoadError, match="receipt"):
        play_one(usage(5, 3), CALIBRATION)

    play_one({**usage(5, 3), "calibration": {"digest": "0"}}, CALIBRATION)


@pytest.mark.parametrize(("calibrator", "seconds"), [("zerotuning", 1.25), ("other", 0.0)])
def test_calibration_seconds_are_read_from_the_histogram(calibrator, seconds):
    async def run():
        async with client_answering(httpx.Response(200, text=METRICS)) as client:
            return await calibration_seconds(client, calibrator)

    assert asyncio.run(run()) == seconds


def test_pictures_are_asked_about_in_chat_and_never_the_same():
    requests = bodies(Shape(2, 75, 3), Pictures(), CALIBRATION)
    seen = [body["messages"][0]["content"][0]["image_url"]["url"] for body in requests]

    assert len(set(seen)) == 2
    assert all("prompt" not in body and "calibration" in body for body in requests)
