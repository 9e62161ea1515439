"""What travels with a request through vLLM, and what comes back.

Down: one entry of `SamplingParams.extra_args`, a dict, which no client can forge: `vllm_xargs`
carries no nested objects. Up: one entry of `EngineCoreOutput.kv_transfer_params`, the dict that
already rides from the scheduler to the front end on every output of a request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from calibrators.interface import Bound, Prefill, Prompt, Span

KEY = "trimtab"


@dataclass(frozen=True, slots=True)
class Payload:
    """A request's calibrations on their way to the workers.

    Attributes:
        ticket: unique per prompt of a client's request; finds the receipt again. Engine request
            ids will not do: clients may choose and repeat them.
        calibrations: bound and in the order they are applied.
        prefill: how the prompt may be cut into steps.
        shareable: cached KV of other requests may be used.
        text_layers: layers in which the prompt has to be seen without its images first.
        text_outputs: what was seen then, by layer; made and read by `text_pass`.
        prompt: where its images and words are; None where nobody needs to know.
    """

    ticket: str
    calibrations: tuple[Bound, ...]
    prefill: Prefill = Prefill.ANY
    shareable: bool = True
    text_layers: tuple[int, ...] = ()
    text_outputs: Mapping[str, str] = field(default_factory=dict)
    prompt: Prompt | None = None

    def to_extra_args(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "ticket": self.ticket,
            "calibrations": [asdict(bound) for bound in self.calibrations],
            "prefill": self.prefill.value,
            "shareable": self.shareable,
            "text_layers": [*self.text_layers],
            "text_outputs": {**self.text_outputs},
            "prompt": None if self.prompt is None else _listed(self.prompt),
        }

    @classmethod
    def from_extra_args(cls, extra_args: Mapping[str, Any] | None) -> Payload | None:
        """The payload of a request, None for a plain one."""
        entry = (extra_args or {}).get(KEY)
        if not isinstance(entry, Mapping):
            return None
        return cls(
            entry["ticket"],
            tuple(Bound(**bound) for bound in entry["calibrations"]),
            Prefill(entry["prefill"]),
            entry["shareable"],
            tuple(entry["text_layers"]),
            entry["text_outputs"],
            None if entry["prompt"] is None else _prompt(*entry["prompt"]),
        )


def _listed(prompt: Prompt) -> list[Any]:
    groups = (prompt.images, prompt.query, prompt.content, prompt.extents)
    return [prompt.length, *([[span.start, span.stop] for span in group] for group in groups)]


def _prompt(length: int, *groups: Sequence[Sequence[int]]) -> Prompt:
    return Prompt(length, *(tuple(Span(*span) for span in group) for group in groups))


@dataclass(slots=True)
class Tally:
    """What the workers did for one calibration of one request so far.

    Attributes:
        prompt_tokens: prompt positions calibrated in at least one layer, those included whose
            KV came out of the prefix cache (made under the same settings).
        completion_tokens: generated positions calibrated; the last sampled token is never fed
            back and does not count.
        sums: per statistic, the sum over calibrated (layer, head, row).
        count: number of calibrated (layer, head, row) in `sums`.
        layer_sums: per statistic of the layers' plans, the sum over layers that have it.
        layer_counts: number of layers in each of `layer_sums`.
        cached: those of `prompt_tokens` whose KV came out of the prefix cache.
        heads: (layer, head) pairs chosen for this request; None where settings alone say which.
        details: of the layers' plans, by name and layer.
        skipped: why the method has nothing to do in any layer resolved so far.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    count: int = 0
    layer_sums: dict[str, float] = field(default_factory=dict)
    layer_counts: dict[str, int] = field(default_factory=dict)
    cached: int = 0
    heads: int | None = None
    details: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: str | None = None

    def plus(self, tokens: int, count: int, sums: Mapping[str, float]) -> Tally:
        """Another, with so many generated tokens more and what statistics were over them."""
        return Tally(
            self.prompt_tokens,
            self.completion_tokens + tokens,
            {**self.sums, **{name: self.sums.get(name, 0.0) + more for name, more in sums.items()}},
            self.count + count,
            self.layer_sums,
            self.layer_counts,
            self.cached,
            self.heads,
            self.details,
            self.skipped,
        )

    @property
    def skip(self) -> str | None:
        """Why nothing was done, None where anything was.

        Where nothing is to be done in the whole prompt, nothing was in what the cache has of it.
        """
        rewritten = self.completion_tokens or self.prompt_tokens > self.cached
        return None if rewritten else self.skipped


@dataclass(frozen=True, slots=True)
class Report:
    """Cumulative tallies of one engine request, as of one of its outputs.

    Attributes:
        ticket: of the payload.
        tallies: one per calibration, in order.
        seconds: time this step spent in calibration, by calibrator; on one report per step.
        failed: a result was not finite, and the request must not be answered.
    """

    ticket: str
    tallies: Sequence[Tally]
    seconds: Mapping[str, float] | None = None
    failed: bool = False

    def to_transfer_params(self) -> dict[str, Any]:
        """Form that msgpack carries; made for every output, and `asdict` takes 20 times as long."""
        tallies = [
            (
                t.prompt_tokens,
                t.completion_tokens,
                {**t.sums},
                t.count,
                {**t.layer_sums},
                {**t.layer_counts},
                t.cached,
                t.heads,
                {name: {**by_layer} for name, by_layer in t.details.items()},
                t.skipped,
            )
            for t in self.tallies
        ]
        return {
            "ticket": self.ticket,
            "tallies": tallies,
            "seconds": self.seconds,
            "failed": self.failed,
        }

    def settled(self) -> Report:
        """As it is now: tallies go on with the next step, which may run before this is read.

        A request that ends with this step would have one counted that came too late to stop.
        """
        return Report(
            self.ticket,
            [Tally(*tally) for tally in self.to_transfer_params()["tallies"]],
            self.seconds,
            self.failed,
        )

    @classmethod
    def from_transfer_params(cls, params: Mapping[str, Any] | None) -> Report | None:
        """The report on an output, None where there is none."""
        entry = (params or {}).get(KEY)
        if entry is None:
            return None
        tallies = [Tally(*tally) for tally in entry["tallies"]]
        return cls(entry["ticket"], tallies, entry["seconds"], entry["failed"])
