"""A small application with our routes, and a fake in the place of vLLM's handlers."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelList, ModelPermission

from calibrators import registry
from calibrators.interface import Prompt
from server import errors
from server.admission import Admission
from server.aliases import aliases
from server.app import ROUTES
from server.engine.geometry import Geometry
from server.engine.payload import Payload, Report, Tally
from server.front_end import FrontEnd
from server.metrics import Metrics
from server.routes import generate


class FakeEngine:
    """Handles requests as vLLM would, and reports what its workers calibrated.

    Attributes:
        requests: every request that came through, as it came.
        identities: ids of the requests, as vLLM takes them.
        payloads: of each prompt's sampling parameters, None for plain ones.
        prompts: number of prompts in a request.
        length: of each prompt in tokens.
        silent: (prompt, choice) pairs on which no report comes.
        status: of answers that are not streamed.
        chunks: a stream's lines, in place of one finishing chunk per choice.
        before_chunk: called before each chunk of a stream.
        ended: answers whose background task has run, as vLLM's count of its load needs.
    """

    def __init__(self):
        self.requests = []
        self.identities = []
        self.payloads = []
        self.prompts = 1
        self.length = 5
        self.silent = set()
        self.status = 200
        self.chunks = None
        self.before_chunk = None
        self.ended = 0

    async def handle(self, request, raw_request):
        self.requests.append(request)
        self.identities.append(raw_request.headers.get("X-Request-Id", request.request_id))
        choices = self._run(request, raw_request.app.state.trimtab)
        if request.stream:
            return StreamingResponse(
                self._stream(choices),
                media_type="text/event-stream",
                background=BackgroundTask(self._end),
            )
        content = {"choices": [{"index": i, "finish_reason": "length"} for i in range(choices)]}
        if self.status != 200:
            content = {"error": {"message": "vLLM's own"}}
        return JSONResponse(
            content, self.status, headers={"X-Load": "3"}, background=BackgroundTask(self._end)
        )

    async def _end(self):
        self.ended += 1

    def _run(self, request, front_end):
        for prompt in range(self.prompts):
            params = request.to_sampling_params(16, {})
            payload = Payload.from_extra_args(params.extra_args)
            self.payloads.append(payload)
            if payload is not None:
                front_end.check_prompt(payload.ticket, Geometry(Prompt(self.length)))
            for choice in range(params.n):
                if payload is not None and (prompt, choice) not in self.silent:
                    tallies = [Tally(5, 3, {"key0_mass_before": 4.0}, 8)] * len(
                        payload.calibrations
                    )
                    front_end.report(Report(payload.ticket, tallies, {"zerotuning": 0.1}), choice)
        return self.prompts * (request.n or 1)

    async def _stream(self, choices):
        for line in self.chunks or [chunk(i, "length") for i in range(choices)]:
            if self.before_chunk is not None:
                await self.before_chunk()
            yield line
        yield "data: [DONE]\n\n"


class FakeModels:
    """What vLLM knows of served models."""

    async def show_available_models(self):
        card = ModelCard(id="m", root="folder", max_model_len=512, permission=[ModelPermission()])
        return ModelList(data=[card])


def chunk(index, finish_reason, text="word"):
    """A chunk as vLLM writes it."""
    choice = {"index": index, "text": text, "finish_reason": finish_reason}
    return f"data: {json.dumps({'choices': [choice]}, separators=(',', ':'))}\n\n"


@pytest.fixture
def make_chunk():
    return chunk


@pytest.fixture
def engine(monkeypatch):
    """The fake engine, behind both handlers."""
    fake = FakeEngine()
    monkeypatch.setattr(generate.chat, "create_chat_completion", fake.handle)
    monkeypatch.setattr(generate.completion, "create_completion", fake.handle)
    return fake


@pytest.fixture
def make_app(make_facts):
    """An application; options go to its `Admission`."""

    def make(facts=None, more=(), **options):
        app = FastAPI()
        for module in ROUTES:
            app.include_router(module.router)
        app.add_exception_handler(errors.ApiError, errors.handle_api_error)
        app.add_exception_handler(HTTPException, errors.handle_http_exception)
        app.add_exception_handler(RequestValidationError, errors.handle_validation_error)
        offer = registry.load()
        for calibrator in more:
            offer.register(calibrator)
        samples = CollectorRegistry()
        app.state.samples = samples
        app.state.engine_client = SimpleNamespace(errored=False)
        admission = Admission(offer, facts or make_facts(), "model", **options)
        app.state.openai_serving_models = FakeModels()
        app.state.trimtab = FrontEnd(
            admission,
            Metrics(offer, "0.32.0", "cpu", samples),
            b"secret",
            aliases(["m"], admission.presets),
        )
        return app

    return make


@pytest.fixture
def app(make_app):
    return make_app()


@pytest.fixture
def client(app, engine):
    return TestClient(app, raise_server_exceptions=False)
