"""A Trimtab server without an engine: a made-up model answers, and counts what it is asked."""

from __future__ import annotations

import json
import signal
from collections import Counter
from contextlib import asynccontextmanager

import httpx

from server.evaluation.api import acquainted
from tests.server.profiling.worlds import sink_strength, strength

IDENTITY = {
    "config_hash": "0" * 64,
    "architecture": "LlamaForCausalLM",
    "layers": 4,
    "query_heads": 6,
}
METHODS = "zerotuning", "act", "var", "gift"
GETS = {
    "/v1/models": {"data": [{"id": "tiny", "root": "/models/tiny"}]},
    "/version": {"version": "0.1", "vllm_version": "0.32"},
    "/v1/calibrators": {"data": [{"id": name} for name in METHODS]},
    **{f"/v1/calibrators/{name}": {"id": name, "unavailable_reason": None} for name in METHODS},
    "/v1/calibration/profiles": {"data": [], "model": IDENTITY},
}


class FakeServer:
    """Answers texts that are numbers: rightly where they are below the model's strength.

    Args:
        heads: effects of ZeroTuning by head.
        pairs: effects of ACT by (layer, head).
        sight: effect of VAR and GIFT, a function of the calibration.
        fail_at: number of the completion that is an error of the server.
        interrupt_at: number of the completion during which the user presses Ctrl-C.
    """

    def __init__(self, heads=None, pairs=None, *, sight=None, fail_at=None, interrupt_at=None):
        self._effects = heads or {}, pairs or {}
        self._sight = sight
        self._fail_at, self._interrupt_at = fail_at, interrupt_at
        self.documents = dict(GETS)
        self.asked = Counter()

    @asynccontextmanager
    async def connected(self, url, api_key=None, *, trust_env=True):
        """In place of `api.connected`."""
        transport = httpx.MockTransport(self._handle)
        async with httpx.AsyncClient(transport=transport, base_url=url) as http:
            yield await acquainted(http)

    def _handle(self, request):
        if request.method == "GET":
            return httpx.Response(200, json=self.documents[request.url.path])
        body = json.loads(request.content)
        self.asked[json.dumps([question(body), body["calibration"], "logprobs" in body])] += 1
        if self.asked.total() == self._fail_at:
            return httpx.Response(500, json={"error": {"message": "out of memory"}})
        if self.asked.total() == self._interrupt_at:
            signal.raise_signal(signal.SIGINT)
        return httpx.Response(200, json=self._answer(body))

    def _answer(self, body):
        calibration = None if body["calibration"] == "none" else body["calibration"]
        right = float(question(body)) < 0.5 + self._strength(calibration)
        text = "yes" if right else "no"
        choice = {"text": text, "message": {"content": text}}
        if "logprobs" in body:
            certainty = -1 / (2 + self._strength(calibration))
            choice["logprobs"] = {"top_logprobs": [{"token_id:1": certainty}]}
        receipt = {} if calibration is None else {"calibration": self._receipt(calibration)}
        return {"choices": [choice], **receipt}

    def _strength(self, calibration):
        heads, pairs = self._effects
        if calibration is not None and calibration["method"] in ("var", "gift"):
            return self._sight(calibration)
        act = calibration is not None and calibration["method"] == "act"
        return sink_strength(calibration, pairs) if act else strength(calibration, heads)

    @staticmethod
    def _receipt(calibration):
        statistics = {"sink_mass_before": 0.25} if calibration["method"] == "act" else {}
        applied = {"method": calibration["method"], "prompt_tokens": 1, "statistics": statistics}
        return {"digest": "d", "applied": [applied]}


def question(body):
    """The text that is asked about."""
    if "prompt" in body:
        return body["prompt"]
    return next(part["text"] for part in body["messages"][-1]["content"] if "text" in part)
