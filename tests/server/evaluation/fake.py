"""A server in the place of Trimtab's: words are tokens, and what it prefers is told to it."""

import json
import re

import httpx

CHAT_END = "<assistant>"


class FakeServer:
    """Writes and weighs the same whatever it is asked, unless told otherwise.

    Args:
        prefers: word that gets the highest log-probability and is written; by whole prompt text
            where it is a function.
        flaw: what it does wrong.
    """

    def __init__(self, prefers="yes", flaw=None):
        self.prefers = prefers if callable(prefers) else lambda text, calibration: prefers
        self.flaw = flaw
        self.words = []
        self.requests = []

    def __call__(self, request):
        path = request.url.path
        if request.method == "GET":
            return httpx.Response(200, json=self.facts(path))
        body = json.loads(request.content)
        if path == "/tokenize":
            return httpx.Response(200, json={"tokens": self.tokenise(self.text(body))})
        self.requests.append((path, body))
        refused = self.refusal(body)
        return refused or httpx.Response(200, json=self.answer(path, body))

    def facts(self, path):
        return {
            "/v1/models": {"data": [{"id": "fake"}]},
            "/version": {"version": "1.2", "vllm_version": "3.4"},
            "/v1/calibrators": {"data": [{"id": "zerotuning"}, {"id": "act"}]},
        }[path]

    def text(self, body):
        if "messages" in body:
            *before, last = body["messages"]
            whole = "".join(f"<{m['role']}>{self.content(m)}" for m in before)
            if body.get("continue_final_message"):
                return f"{whole}{CHAT_END}{last['content']}"
            return f"{whole}<{last['role']}>{self.content(last)}{CHAT_END}"
        prompt = body["prompt"]
        if isinstance(prompt, str):
            return prompt
        return "".join(self.words[token] for token in prompt)

    def content(self, message):
        content = message["content"]
        return content if isinstance(content, str) else "<image>"

    def tokenise(self, text):
        pieces = re.findall(r"<\w+>| ?\w+| +|[^\w ]", text)
        return [self.token(piece) for piece in pieces]

    def token(self, word):
        if word not in self.words:
            self.words.append(word)
        return self.words.index(word)

    def refusal(self, body):
        calibration = body["calibration"]
        gamma = calibration.get("gamma", 1) if isinstance(calibration, dict) else 1
        if gamma <= 0:
            error = {"message": "gamma must be above 0", "param": "calibration.gamma"}
            return httpx.Response(400, json={"error": error})
        if self.flaw == "fails once" and len(self.requests) == 4:
            return httpx.Response(500, json={"error": {"message": "not finite", "param": None}})
        if self.flaw == "breaks" and len(self.requests) == 4:
            raise httpx.ReadError("")
        return httpx.Response(502, text="<html>") if self.flaw == "no JSON" else None

    def answer(self, path, body):
        preferred = self.prefers(self.text(body), body["calibration"])
        choice = {"text": preferred, "message": {"content": preferred}}
        if "logprob_token_ids" in body:
            choice["logprobs"] = self.logprobs(path, body["logprob_token_ids"], preferred)
        return {"choices": [choice]} | self.receipt(body["calibration"])

    def logprobs(self, path, tokens, preferred):
        weights = {f"token_id:{t}": -1.0 if self.words[t] == preferred else -2.0 for t in tokens}
        if self.flaw == "a token is missing":
            weights.popitem()
        if path == "/v1/completions":
            return {"top_logprobs": [weights]}
        entries = [{"token": token, "logprob": value} for token, value in weights.items()]
        return {"content": [{"top_logprobs": entries}]}

    def receipt(self, calibration):
        plain = calibration == "none"
        silent = self.flaw != "never plain" if plain else self.flaw == "no receipt"
        if silent:
            return {}
        entries = calibration if isinstance(calibration, list) else [calibration]
        names = [e["method"] if isinstance(e, dict) else e for e in entries]
        if self.flaw == "other method":
            names = ["act"]
        skipped = "nothing to do" if self.flaw == "skips" else None
        count = {"prompt_tokens": 5, "completion_tokens": 0, "skipped": skipped}
        digest = f"{len(self.requests):012}" if self.flaw == "digest changes" else "0123456789ab"
        return {
            "calibration": {"digest": digest, "applied": [{"method": n, **count} for n in names]}
        }
