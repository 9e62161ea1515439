import asyncio
from types import SimpleNamespace

import pytest
from vllm.exceptions import GenerationError

from calibrators.interface import Bound
from server.engine.payload import KEY, Payload, Report, Tally
from server.engine.preludes import Preludes, precede, without_images
from server.engine.text_pass import OUTPUTS, text_pass

LAYERS = (1, 5)
SEEN = {"1": "one", "5": "five"}
BOUND = Bound("vhr", {"alpha": 2.0}, 2, 12)


def span(offset, length):
    return SimpleNamespace(offset=offset, length=length)


PROMPT = {
    "type": "multimodal",
    "prompt_token_ids": [1, 9, 9, 9, 2, 3, 9, 9, 4],
    "mm_placeholders": {"image": [span(1, 3), span(6, 2)]},
    "cache_salt": "salt",
}


class Engine:
    """An engine client that reports of text passes what it is told to.

    Attributes:
        calls: prompt, payload, id and options of each request whose output was read.
        closed: ids of requests whose outputs were given up.
    """

    def __init__(self, preludes, seen=SEEN, failed=False, error=None, stuck=None):
        self.preludes, self.seen, self.failed = preludes, seen, failed
        self.error, self.stuck = error, stuck
        self.calls, self.closed = [], []

    async def generate(self, prompt, sampling_params, request_id, **options):
        payload = Payload.from_extra_args(sampling_params.extra_args)
        self.calls.append((prompt, payload, sampling_params, request_id, options))
        try:
            if request_id.endswith("-text"):
                await self._look(payload)
            for part in ("first", "second"):
                yield f"{part} of {request_id}"
        except (asyncio.CancelledError, GeneratorExit):
            self.closed.append(request_id)
            raise

    async def _look(self, payload):
        if self.stuck is not None:
            self.stuck.set()
            await asyncio.Event().wait()
        if self.error is not None:
            raise self.error
        tallies = [Tally(details={OUTPUTS: dict(self.seen)} if self.seen else {})]
        report = Report(payload.ticket, tallies, failed=self.failed)
        # Reports travel, and so lose what is no JSON.
        report = Report.from_transfer_params({KEY: report.to_transfer_params()})
        assert self.preludes.take(report)


@pytest.fixture
def preludes():
    return Preludes()


@pytest.fixture
def make_engine(preludes):
    def make(**behaviour):
        engine = Engine(preludes, **behaviour)
        precede(engine, preludes)
        return engine

    return make


def sampling(layers=LAYERS, ticket="t"):
    payload = Payload(ticket, (BOUND,), text_layers=layers)
    return SimpleNamespace(extra_args={"other": 1, KEY: payload.to_extra_args()}, n=2)


def read(outputs):
    async def collect():
        return [output async for output in outputs]

    return asyncio.run(collect())


def test_a_request_runs_when_its_prompt_has_run_without_images(make_engine, preludes):
    engine, params = make_engine(), sampling()
    outputs = read(engine.generate(PROMPT, params, "id", priority=3, trace_headers={}))
    assert outputs == ["first of id", "second of id"]
    (text, pass_, small, text_id, options), (whole, main, given, main_id, others) = engine.calls
    assert (text_id, main_id) == ("id-text", "id")
    assert text["prompt_token_ids"] == [1, 2, 3, 4]
    assert (text["type"], text["cache_salt"]) == ("token", "salt")
    assert (small.max_tokens, small.n, options) == (1, 1, {"priority": 3})
    assert pass_ == Payload("t-text", (text_pass(LAYERS),))
    assert (whole, given, others) == (PROMPT, params, {"priority": 3, "trace_headers": {}})
    assert (main.text_outputs, main.text_layers) == (SEEN, LAYERS)
    assert (main.ticket, main.calibrations) == ("t", (BOUND,))
    assert params.extra_args["other"] == 1
    assert len(preludes) == 0


@pytest.mark.parametrize("extra_args", [None, {}, sampling(layers=()).extra_args])
def test_others_run_at_once(make_engine, extra_args):
    engine = make_engine()
    params = SimpleNamespace(extra_args=extra_args)
    assert read(engine.generate(PROMPT, params, "id")) == ["first of id", "second of id"]
    assert len(engine.calls) == 1


@pytest.mark.parametrize(
    "behaviour",
    [{"failed": True}, {"seen": {}}, {"seen": {"1": "one"}}, {"seen": SEEN | {"2": "two"}}],
)
def test_a_text_pass_that_failed_fails_its_request(make_engine, preludes, behaviour):
    engine = make_engine(**behaviour)
    with pytest.raises(GenerationError, match="without its images"):
        read(engine.generate(PROMPT, sampling(), "id"))
    assert [call[3] for call in engine.calls] == ["id-text"]
    assert len(preludes) == 0


def test_a_text_pass_that_is_refused_refuses_its_request(make_engine, preludes):
    engine = make_engine(error=ValueError("queue is full"))
    with pytest.raises(ValueError, match="queue is full"):
        read(engine.generate(PROMPT, sampling(), "id"))
    assert len(engine.calls) == 1
    assert len(preludes) == 0


def test_who_leaves_takes_the_text_pass_along(make_engine, preludes):
    async def leave():
        engine = make_engine(stuck=asyncio.Event())
        outputs = engine.generate(PROMPT, sampling(), "id")
        waiting = asyncio.ensure_future(anext(outputs))
        await engine.stuck.wait()
        assert len(preludes) == 1
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        return engine

    engine = asyncio.run(leave())
    assert engine.closed == ["id-text"]
    assert [call[3] for call in engine.calls] == ["id-text"]
    assert len(preludes) == 0


def test_who_leaves_later_aborts_the_request(make_engine, preludes):
    async def leave():
        engine = make_engine()
        outputs = engine.generate(PROMPT, sampling(), "id")
        assert await anext(outputs) == "first of id"
        assert len(preludes) == 0
        await outputs.aclose()
        return engine

    assert asyncio.run(leave()).closed == ["id"]


def test_requests_at_the_same_time_keep_apart(make_engine, preludes):
    async def together():
        engine = make_engine()
        pairs = [(f"t{i}", f"id{i}") for i in range(3)]
        streams = [engine.generate(PROMPT, sampling(ticket=t), name) for t, name in pairs]
        await asyncio.gather(*(anext(stream) for stream in streams))
        for stream in streams:
            await stream.aclose()
        return {call[3]: call[1] for call in engine.calls}

    payloads = asyncio.run(together())
    assert len(payloads) == 6
    assert {payloads[f"id{i}-text"].ticket for i in range(3)} == {"t0-text", "t1-text", "t2-text"}


def test_reports_of_others_are_left_alone(preludes):
    assert not preludes.take(Report("t", [Tally()]))
    assert not preludes.take(Report("t-text", [Tally()]))


def test_a_prompt_without_images_is_its_own_text():
    plain = {"type": "token", "prompt_token_ids": [4, 5]}
    assert without_images(plain) == plain
