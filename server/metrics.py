"""Prometheus metrics of calibration, beside vLLM's own.

Label values come from the registry and from constants here, never from a request.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from server import __version__
from server.admission import REASONS, Refusal
from server.engine.payload import Report, Tally
from server.receipts import APPLIED, SKIPPED, Receipt, statistics

OUTCOMES = (APPLIED, SKIPPED, "rejected", "failed")
PHASES = ("prompt", "completion")
MOMENTS = ("before", "after")
OVERLOADED = "overloaded"
PROFILE_OUTCOMES = ("loaded", "refused")

FAMILIES: frozenset[str] = frozenset(
    {
        "trimtab_requests_total",
        "trimtab_calibrated_tokens_total",
        "trimtab_rejections_total",
        "trimtab_calibration_seconds",
        "trimtab_active_requests",
        "trimtab_sink_mass_ratio",
        "trimtab_profile_loads_total",
        "trimtab_build_info",
    }
)

# A step's calibration takes tens of microseconds on a GPU and milliseconds on a CPU.
SECONDS = (1e-5, 1e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.5)
RATIOS = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


class Metrics:
    """The `trimtab_*` families; every known label value is exported as 0 from the start.

    Args:
        calibrators: names on offer.
        vllm_version: of the engine.
        device: `cpu` or `cuda`.
        registry: where to register.
    """

    def __init__(
        self,
        calibrators: Iterable[str],
        vllm_version: str,
        device: str,
        registry: CollectorRegistry = REGISTRY,
    ) -> None:
        names = self._names = tuple(calibrators)
        self._requests = Counter(
            "trimtab_requests",
            "Requests that asked for a calibration, by calibrator and outcome.",
            ("calibrator", "outcome"),
            registry=registry,
        )
        self._tokens = Counter(
            "trimtab_calibrated_tokens",
            "Token positions calibrated in at least one layer, as counted by the workers.",
            ("calibrator", "phase"),
            registry=registry,
        )
        self._rejections = Counter(
            "trimtab_rejections",
            "Requests refused for their calibration or for lack of room, by reason.",
            ("reason",),
            registry=registry,
        )
        self._active = Gauge(
            "trimtab_active_requests",
            "Calibrated requests being served.",
            ("calibrator",),
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._profile_loads = Counter(
            "trimtab_profile_loads", "Profiles read.", ("outcome",), registry=registry
        )
        self._seconds, self._sink_mass = _histograms(registry)
        _build_info(registry).labels(__version__, vllm_version, device).set(1)
        self._export_zeros(names)

    def _export_zeros(self, names: tuple[str, ...]) -> None:
        for name in names:
            self._active.labels(name)
            self._seconds.labels(name)
            for outcome in OUTCOMES:
                self._requests.labels(name, outcome)
            for phase in PHASES:
                self._tokens.labels(name, phase)
            for moment in MOMENTS:
                self._sink_mass.labels(name, moment)
        for reason in (*REASONS, OVERLOADED):
            self._rejections.labels(reason)
        for outcome in PROFILE_OUTCOMES:
            self._profile_loads.labels(outcome)

    def refused(self, refusal: Refusal) -> None:
        """A request was refused for its calibration."""
        self._rejections.labels(refusal.reason).inc()
        if refusal.method is not None:
            self._requests.labels(refusal.method, "rejected").inc()

    def overloaded(self) -> None:
        """A request was refused because too many are being served."""
        self._rejections.labels(OVERLOADED).inc()

    def profiles_loaded(self, number: int) -> None:
        """So many profiles were read at the start. One that is refused ends it."""
        self._profile_loads.labels("loaded").inc(number)

    def opened(self, receipt: Receipt) -> None:
        """A calibrated request starts."""
        for method in receipt.admitted.methods:
            self._active.labels(method).inc()

    def withdrawn(self, receipt: Receipt) -> None:
        """A calibrated request was refused once its prompt was known."""
        for method in receipt.admitted.methods:
            self._active.labels(method).dec()

    def closed(self, receipt: Receipt, *, answered: bool) -> None:
        """A calibrated request ended, answered in full or not."""
        for bound, tally in receipt.totals():
            self._active.labels(bound.method).dec()
            outcome = SKIPPED if tally.skip else APPLIED
            self._requests.labels(bound.method, outcome if answered else "failed").inc()
            self._count(bound.method, tally)

    def stepped(self, report: Report) -> None:
        """A step was calibrated; a text pass in it is part of no calibrator's time."""
        for method, seconds in (report.seconds or {}).items():
            if method in self._names:
                self._seconds.labels(method).observe(seconds)

    def _count(self, method: str, tally: Tally) -> None:
        self._tokens.labels(method, "prompt").inc(tally.prompt_tokens)
        self._tokens.labels(method, "completion").inc(tally.completion_tokens)
        for moment, ratio in _mass(statistics(tally)).items():
            self._sink_mass.labels(method, moment).observe(ratio)


def _histograms(registry: CollectorRegistry) -> tuple[Histogram, Histogram]:
    seconds = Histogram(
        "trimtab_calibration_seconds",
        "Time an engine step spent in calibration.",
        ("calibrator",),
        buckets=SECONDS,
        registry=registry,
    )
    sink_mass = Histogram(
        "trimtab_sink_mass_ratio",
        "Mean attention mass on the keys a method acts on, per request, before and after.",
        ("calibrator", "when"),
        buckets=RATIOS,
        registry=registry,
    )
    return seconds, sink_mass


def _build_info(registry: CollectorRegistry) -> Gauge:
    """A gauge set to 1, since prometheus_client's Info does not work in several processes."""
    return Gauge(
        "trimtab_build_info",
        "Versions and device; always 1.",
        ("version", "vllm_version", "device"),
        registry=registry,
        multiprocess_mode="livemax",
    )


def _mass(means: Mapping[str, float]) -> Mapping[str, float]:
    """The mass a method acts on, before and after, whatever it calls it."""
    return {
        moment: value
        for moment in MOMENTS
        for name, value in means.items()
        if name.endswith(f"_mass_{moment}")
    }
