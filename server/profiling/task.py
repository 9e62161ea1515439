"""What a command line asks to search: data, samples, settings."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from calibrators.profiles import SUFFIX
from calibrators.settings import Name
from server.evaluation.command import Unusable
from server.evaluation.samples import Dataset, Sample, Scoring, draw, read
from server.profiling.method import SEEING


@dataclass(frozen=True, slots=True)
class Task:
    """A search on data.

    Attributes:
        args: parsed flags.
        data: the file's samples.
        search: samples to search with.
        report: samples to report on, none of them among `search`.
    """

    args: argparse.Namespace
    data: Dataset
    search: tuple[Sample, ...]
    report: tuple[Sample, ...]

    @classmethod
    def of(cls, args: argparse.Namespace) -> Task:
        """The task of parsed flags.

        Raises:
            DataError: the data cannot be used, lacks images that the method needs, or a split is
                empty.
            Unusable: the profile would not be one, or is there already, or a model is needed.
        """
        _check_out(args.out)
        _check_model(args)
        unlabelled = args.method == "zerotuning" and args.unsupervised
        data = read(args.data, unlabelled=unlabelled, images=args.method in SEEING)
        seed = args.seed
        return cls(
            args,
            data,
            draw(data.part("search", seed), args.samples, seed),
            draw(data.part("report", seed), args.report_samples, seed),
        )

    @property
    def state(self) -> Path:
        """File of the measurements so far."""
        given: Path | None = self.args.state
        return given or self.args.out.with_name(f"{self.args.out.name}.partial.jsonl")

    @property
    def scoring(self) -> Scoring:
        """How samples are asked."""
        given: Scoring | None = self.args.scoring
        return given or self.data.scoring

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that measurements depend on, whatever the method."""
        return {
            "scoring": self.scoring,
            "max_tokens": self.args.max_tokens if self.scoring == "generate" else None,
            "seed": self.args.seed,
            "samples": self.args.samples,
            "report_samples": self.args.report_samples,
            "serve_flags": self.args.serve_flags,
        }


def _check_out(out: Path) -> None:
    """Refuse before hours of work what could not be written after them."""
    if out.suffix != SUFFIX:
        raise Unusable(f"--out {out}: a profile's name ends in {SUFFIX}")
    try:
        TypeAdapter(Name).validate_python(out.stem)
    except ValidationError:
        raise Unusable(
            f"--out {out}: a profile's name has lower-case letters, digits, '.', '_' and '-' only"
        ) from None
    if out.exists():
        raise Unusable(f"{out} is there already; name another profile")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Unusable(f"--out {out}: {error.strerror}") from None


def _check_model(args: argparse.Namespace) -> None:
    if args.method not in SEEING or args.model is not None:
        return
    if args.url is None:
        raise Unusable(f"--model is needed: {args.method} is for models that take images")
    if args.method == "var" and args.sink_dims is None:
        raise Unusable("--model is needed, to look for its sinks; --sink-dims does without")
