"""A server in the place of Trimtab's, with a clock of its own that its streams move."""

import json

import httpx

SCHEMA = {"properties": {"gamma": {"examples": [0.5]}, "layers": {}}}
ENTRIES = (
    ("zerotuning", "text", {"gamma": None, "layers": "all"}, SCHEMA),
    ("act", "text", {"beta": 0.4}, {"properties": {"beta": {}}}),
    ("var", "vision", {}, {"properties": {}}),
    ("vhr", "vision", {"alpha": 2.0}, {"properties": {"alpha": {}}}),
)
TEXT_ONLY = "this one takes text only"
PICTURE_TOKENS = 100


class FakeServer:
    """Takes a second to the first token of a plain request and a tenth for each further one.

    Args:
        slower: factors on these times, by the name of a calibrator.
        vision: whether the model takes pictures.
        flaws: what it does wrong, by the name of a calibrator, or `none` for plain requests.
        drift: factor on all times with every request.
    """

    def __init__(self, slower=None, *, vision=False, flaws=None, drift=1.0):
        self.slower, self.vision, self.flaws = slower or {}, vision, flaws or {}
        self.drift = drift
        self.now = 0.0
        self.requests = []

    def perf_counter(self):
        return self.now

    def __call__(self, request):
        path = request.url.path
        if path == "/metrics":
            if "metrics" in self.flaws:
                return httpx.Response(404, json={"error": {"message": "no such route"}})
            labels = 'version="1.2",vllm_version="3.4",device="cpu"'
            return httpx.Response(200, text=f"trimtab_build_info{{{labels}}} 1.0\n")
        if request.method == "GET":
            return httpx.Response(200, json=self.facts(path))
        body = json.loads(request.content)
        if path == "/tokenize":
            return httpx.Response(200, json={"tokens": self.tokenise(body["prompt"])})
        self.requests.append((path, body))
        return self.answer(body)

    def facts(self, path):
        return {
            "/v1/models": {"data": [{"id": "fake"}, {"id": "fake:preset", "parent": "fake"}]},
            "/version": {"version": "1.2", "vllm_version": "3.4"},
            "/v1/calibrators": {"data": [self.entry(*each) for each in ENTRIES]},
        }[path]

    def entry(self, name, modality, defaults, schema):
        reason = TEXT_ONLY if modality == "vision" and not self.vision else None
        return {
            "id": name,
            "modality": modality,
            "available": reason is None,
            "unavailable_reason": reason,
            "defaults": defaults,
            "params_schema": schema,
        }

    def tokenise(self, text):
        """Two tokens a word."""
        return [] if "empty" in self.flaws else list(range(2 * len(text.split())))

    def answer(self, body):
        name = method(body["calibration"])
        flaw = self.flaws.get(name)
        if flaw == "refused" or (name == "var" and body["calibration"] == "var"):
            error = {"message": "more is needed", "param": "calibration"}
            return httpx.Response(400, json={"error": error})
        if flaw == "breaks":
            raise httpx.ReadError("")
        if flaw == "no JSON":
            return httpx.Response(502, text="<html>")
        return httpx.Response(200, stream=Chunks(self, body, flaw))

    def chunks(self, body, flaw):
        """Lines of the stream, and the seconds before each."""
        tokens = body["max_tokens"] - (flaw == "too short")
        for index in range(tokens):
            chunk = {"choices": [{"text": "", "finish_reason": None}]}
            if index == tokens - 1:
                chunk |= self.receipt(body["calibration"], flaw)
            if flaw == "fails" and index == 1:
                chunk = {"error": {"message": "not finite"}}
            yield chunk, 1.0 if index == 0 else 0.1
        yield {"choices": [], "usage": usage(body, tokens)}, 0.0

    def receipt(self, calibration, flaw):
        if (calibration == "none" and flaw != "calibrated") or flaw == "no receipt":
            return {}
        entry = {
            "method": method(calibration),
            "prompt_tokens": 0 if flaw == "nothing" else 5,
            "completion_tokens": 0,
            "skipped": "no word with a meaning" if flaw == "skips" else None,
        }
        digest = f"{len(self.requests):012}" if flaw == "digests" else "0123456789ab"
        return {"calibration": {"digest": digest, "applied": [entry]}}


class Chunks(httpx.AsyncByteStream):
    def __init__(self, server, body, flaw):
        self.server, self.body, self.flaw = server, body, flaw

    async def __aiter__(self):
        factor = self.server.slower.get(method(self.body["calibration"]), 1.0)
        factor *= self.server.drift ** len(self.server.requests)
        for chunk, seconds in self.server.chunks(self.body, self.flaw):
            self.server.now += seconds * factor
            yield f"data: {json.dumps(chunk)}\n\n".encode()
        yield b"data: nonsense\n\n" if self.flaw == "bad chunk" else b"data: [DONE]\n\n"


def method(calibration):
    return calibration["method"] if isinstance(calibration, dict) else calibration


def usage(body, tokens):
    length = len(body["prompt"]) if "prompt" in body else PICTURE_TOKENS + len(words(body))
    return {"prompt_tokens": length, "completion_tokens": tokens}


def words(body):
    """Of a chat with one picture."""
    (message,) = body["messages"]
    picture, text = message["content"]
    assert picture["type"] == "image_url"
    return text["text"].split()
