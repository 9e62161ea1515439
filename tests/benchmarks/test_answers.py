import asyncio
import base64
import io
import json

import httpx
import pytest
from PIL import Image

from benchmarks.answers import Answer, Asker, AskError, Question, body_of, data_url

PICTURE = Image.new("RGB", (4, 3), (10, 20, 30))
QUESTION = Question(PICTURE, "Is there a star?")


def content(text, applied=None):
    receipt = {} if applied is None else {"calibration": {"applied": applied}}
    return {"choices": [{"message": {"content": text}}], **receipt}


def ask(answer, questions=(QUESTION,), calibration=None, parallel=4):
    """Answers of a server that answers with what `answer` makes of a request body."""

    def handle(request):
        made = answer(json.loads(request.content))
        return made if isinstance(made, httpx.Response) else httpx.Response(200, json=made)

    async def run():
        transport = httpx.MockTransport(handle)
        async with Asker("http://server", "m", None, parallel, transport) as asker:
            return await asker.ask(questions, calibration)

    return asyncio.run(run())


def failure(*arguments, **options):
    with pytest.raises(AskError) as caught:
        ask(*arguments, **options)
    return str(caught.value)


def test_a_picture_travels_unharmed():
    head, _, data = data_url(PICTURE).partition(",")

    assert head == "data:image/png;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).getpixel((0, 0)) == (10, 20, 30)


def test_plain_requests_carry_no_calibration():
    assert "calibration" not in body_of(QUESTION, "m", None)
    assert body_of(QUESTION, "m", "var")["calibration"] == "var"
    assert body_of(QUESTION, "m", None)["temperature"] == 0


def test_answers_come_in_the_order_of_the_questions():
    def echo(body):
        return content(body["messages"][0]["content"][1]["text"])

    questions = [Question(PICTURE, str(index)) for index in range(20)]

    assert [answer.text for answer in ask(echo, questions)] == [str(i) for i in range(20)]


@pytest.mark.parametrize(("reason", "skipped"), [(None, False), ("no content words", True)])
def test_receipts_tell_what_was_skipped(reason, skipped):
    applied = [{"method": "gift", "skipped": reason}]

    assert ask(lambda _: content("No", applied), calibration="gift") == [Answer("No", skipped)]


def test_refusals_are_told_in_the_servers_words():
    refused = httpx.Response(400, json={"error": {"message": "unknown calibrator"}})

    assert "status 400" in failure(lambda _: refused)
    assert "unknown calibrator" in failure(lambda _: refused)


def test_a_calibrated_answer_without_receipt_is_no_answer():
    assert "without a receipt" in failure(lambda _: content("No"), calibration="var")


def test_a_server_that_is_not_there_is_told():
    def refuse(_):
        raise httpx.ConnectError("refused")

    assert failure(refuse) == "ConnectError: refused"
