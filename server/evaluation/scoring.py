"""Two ways to ask a sample: let the model write, or weigh what it might write."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from server.evaluation.answers import matched
from server.evaluation.api import Answer, Api, ApiFailure, Calibration, Receipt, member
from server.evaluation.flags import MAX_TOKENS
from server.evaluation.samples import Sample

Tokens: TypeAlias = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a sample.

    Attributes:
        choice: the choice the model took, None where its text names none.
        text: what it wrote; None where choices were weighed.
        logprobs: log-probability of each choice; None where the model wrote.
        receipts: of every calibrated request that was sent.
    """

    choice: str | None
    text: str | None
    logprobs: Mapping[str, float] | None
    receipts: tuple[Receipt, ...]


class Scorer(Protocol):
    """Puts a sample to the server."""

    async def ask(self, sample: Sample, calibration: Calibration) -> Verdict:
        """The model's verdict on a sample; plain where `calibration` is None.

        Raises:
            ApiFailure: an answer is an error, or not calibrated as asked.
        """


class Generate:
    """The model writes at most `max_tokens` tokens, the likeliest each time.

    The text is matched to the choices; see `answers.matched`.
    """

    def __init__(self, api: Api, max_tokens: int = MAX_TOKENS) -> None:
        self._api = api
        self._max_tokens = max_tokens

    async def ask(self, sample: Sample, calibration: Calibration) -> Verdict:
        """See `Scorer`."""
        if sample.prompt is None:
            answer = await self._api.chat(
                calibration, messages=sample.messages, max_tokens=self._max_tokens
            )
            text = str(member(answer.choice, "message", "content") or "")
        else:
            answer = await self._api.complete(
                calibration, prompt=sample.prompt, max_tokens=self._max_tokens
            )
            text = str(member(answer.choice, "text"))
        return Verdict(matched(text, sample.choices), text, None, _receipts(answer))


class Logprob:
    """The choice with the highest log-probability as continuation of the prompt.

    The log-probability of a choice is the sum over its tokens. One request generates one token
    and returns the log-probabilities of the tokens asked for. It is sent once for every distinct
    beginning of the choices' token sequences: once in all where each choice is one token. The
    tokens of such a beginning are sent behind those of the prompt.
    """

    def __init__(self, api: Api) -> None:
        self._api = api
        self._tokenised: dict[str, tuple[Tokens, dict[str, Tokens]]] = {}

    async def ask(self, sample: Sample, calibration: Calibration) -> Verdict:
        """See `Scorer`."""
        prompt, choices = await self._tokens(sample)
        totals = dict.fromkeys(choices, 0.0)
        receipts: list[Receipt] = []
        for begun, following in continuations(choices).items():
            answer = await self._step(sample, calibration, prompt, begun, following)
            logprobs = _logprobs(answer.choice, following)
            receipts += _receipts(answer)
            for choice, tokens in choices.items():
                if len(tokens) > len(begun) and tokens[: len(begun)] == begun:
                    totals[choice] += logprobs[tokens[len(begun)]]
        best = max(totals, key=totals.__getitem__)
        return Verdict(best, None, totals, tuple(receipts))

    async def _step(
        self,
        sample: Sample,
        calibration: Calibration,
        prompt: Tokens,
        begun: Tokens,
        following: Tokens,
    ) -> Answer:
        options: dict[str, Any] = {
            "max_tokens": 1,
            "logprob_token_ids": following,
            "return_tokens_as_token_ids": True,
        }
        if sample.prompt is None and not begun:
            # By its own route, for the sake of images, which are no tokens.
            return await self._api.chat(
                calibration, messages=sample.messages, logprobs=True, **options
            )
        if any(not isinstance(message["content"], str) for message in sample.messages):
            raise ApiFailure("with images, every choice has to be a single token")
        return await self._api.complete(
            calibration, prompt=[*prompt, *begun], logprobs=1, **options
        )

    async def _tokens(self, sample: Sample) -> tuple[Tokens, dict[str, Tokens]]:
        """Tokens of the prompt and of each choice behind it; the same for every calibration."""
        if sample.id not in self._tokenised:
            prompt, *whole = await asyncio.gather(
                self._tokenise(sample, None),
                *(self._tokenise(sample, choice) for choice in sample.choices),
            )
            choices = {
                choice: _behind(prompt, tokens, choice)
                for choice, tokens in zip(sample.choices, whole, strict=True)
            }
            if len(set(choices.values())) < len(choices):
                raise ApiFailure("two choices are the same tokens")
            self._tokenised[sample.id] = prompt, choices
        return self._tokenised[sample.id]

    async def _tokenise(self, sample: Sample, choice: str | None) -> Tokens:
        if sample.prompt is not None:
            return tuple(await self._api.tokens(prompt=sample.prompt + (choice or "")))
        if choice is None:
            return tuple(await self._api.tokens(messages=sample.messages))
        return tuple(
            await self._api.tokens(
                messages=[*sample.messages, {"role": "assistant", "content": choice}],
                add_generation_prompt=False,
                continue_final_message=True,
            )
        )


def continuations(choices: Mapping[str, Tokens]) -> dict[Tokens, Tokens]:
    """What may follow each distinct beginning of the choices: the inner nodes of their trie."""
    following: defaultdict[Tokens, set[int]] = defaultdict(set)
    for tokens in choices.values():
        for length, token in enumerate(tokens):
            following[tokens[:length]].add(token)
    return {begun: tuple(sorted(next_ones)) for begun, next_ones in following.items()}


def _behind(prompt: Tokens, whole: Tokens, choice: str) -> Tokens:
    if whole[: len(prompt)] != prompt or len(whole) == len(prompt):
        raise ApiFailure(
            f"the choice {choice!r} does not begin with a token of its own behind the prompt; "
            "let the prompt end without a space and the choice begin with one"
        )
    return whole[len(prompt) :]


def _logprobs(choice: object, wanted: Tokens) -> dict[int, float]:
    """Log-probabilities of `wanted`, in the form of either route."""
    logprobs = member(choice, "logprobs")
    if isinstance(logprobs, dict) and "content" in logprobs:
        entries = member(logprobs, "content", 0, "top_logprobs")
        by_name = {member(entry, "token"): member(entry, "logprob") for entry in entries}
    else:
        by_name = member(logprobs, "top_logprobs", 0)
    return {token: float(member(by_name, f"token_id:{token}")) for token in wanted}


def _receipts(answer: Answer) -> tuple[Receipt, ...]:
    return () if answer.receipt is None else (answer.receipt,)
