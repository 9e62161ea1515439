"""What is asked of a sample, and the numbers that come of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, TypeAlias

from server.evaluation.api import Answer, Api, ApiFailure, Calibration, member
from server.evaluation.samples import Sample
from server.evaluation.scoring import Scorer, Verdict

Values: TypeAlias = Mapping[str, float]
"""Numbers of one sample, by name."""

# What vLLM allows without --max-logprobs.
TOP = 20


class Question(Protocol):
    """Asks a sample for numbers."""

    async def ask(self, sample: Sample, calibration: Calibration) -> Values:
        """Numbers of a sample under a calibration; plain where it is None.

        Raises:
            ApiFailure: an answer is an error, or not calibrated as asked.
        """


class Answers:
    """Whether the answer is right and valid; its margin where choices are weighed.

    The margin is the log-probability of the right choice less that of the best other one.
    """

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer

    async def ask(self, sample: Sample, calibration: Calibration) -> Values:
        """See `Question`."""
        verdict = await self._scorer.ask(sample, calibration)
        return {
            "accuracy": float(verdict.choice == sample.answer),
            "valid": float(verdict.choice is not None),
            **_margin(verdict, sample),
        }


class Entropy:
    """Entropy of the first token of the answer, in nats.

    The server tells the probabilities of the `TOP` likeliest tokens. What is left counts as one
    token, so this is a lower bound; it needs no right answers.
    """

    def __init__(self, api: Api) -> None:
        self._api = api

    async def ask(self, sample: Sample, calibration: Calibration) -> Values:
        """See `Question`."""
        answer = await _one_token(self._api, sample, calibration, logprobs=TOP)
        return {"entropy": entropy(_logprobs(answer.choice))}


class Sinks:
    """Attention that the sinks of ACT draw before it is calibrated, as the receipt has it."""

    def __init__(self, api: Api) -> None:
        self._api = api

    async def ask(self, sample: Sample, calibration: Calibration) -> Values:
        """See `Question`."""
        answer = await _one_token(self._api, sample, calibration)
        if answer.receipt is None:
            raise ApiFailure("sinks are counted in calibrated requests alone")
        # Left out where no row saw a sink.
        return {"sink_mass": answer.receipt.statistics.get("sink_mass_before", 0.0)}


def entropy(logprobs: Iterable[float]) -> float:
    """Entropy in nats of a distribution whose other outcomes are taken for one."""
    probabilities = [math.exp(logprob) for logprob in logprobs]
    rest = 1 - sum(probabilities)
    return -sum(p * math.log(p) for p in (*probabilities, rest) if p > 0)


def _margin(verdict: Verdict, sample: Sample) -> Values:
    if verdict.logprobs is None:
        return {}
    others = [value for choice, value in verdict.logprobs.items() if choice != sample.answer]
    return {"margin": verdict.logprobs[sample.answer] - max(others)}


async def _one_token(
    api: Api, sample: Sample, calibration: Calibration, logprobs: int | None = None
) -> Answer:
    body: dict[str, Any] = {"max_tokens": 1}
    if sample.prompt is not None:
        if logprobs is not None:
            # Under their text, tokens that read alike would be one.
            body |= {"logprobs": logprobs, "return_tokens_as_token_ids": True}
        return await api.complete(calibration, prompt=sample.prompt, **body)
    if logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": logprobs}
    return await api.chat(calibration, messages=sample.messages, **body)


def _logprobs(choice: object) -> list[float]:
    """Log-probabilities of the likeliest first tokens, in the form of either route."""
    logprobs = member(choice, "logprobs")
    if isinstance(logprobs, dict) and "content" in logprobs:
        entries = member(logprobs, "content", 0, "top_logprobs")
        return [float(member(entry, "logprob")) for entry in entries]
    return [float(value) for value in member(logprobs, "top_logprobs", 0).values()]
