"""Writes labelled samples for `trimtab profile` and `trimtab eval`: is it in the picture or not?

    python -m examples.shapes_llava.samples --scenes 80 --out shapes.jsonl

Scenes lack a companion that nearly always came along in the model's training. It is asked about a
missing companion, and about something that is there. Every other scene is for the search, the
rest for the report.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from examples.shapes_llava.questions import presence
from examples.shapes_llava.scenes import Scene, draw, scenes

LABELS = ["Yes", "No"]


def main(argv: Sequence[str] | None = None) -> int:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument("--scenes", type=int, default=80, help="two samples each")
    parser.add_argument("--seed", type=int, default=7, help="of scenes and questions")
    args = parser.parse_args(argv)
    lines = (json.dumps(sample) + "\n" for sample in samples(args.scenes, args.seed))
    args.out.write_text("".join(lines), encoding="utf-8")
    return 0


def samples(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Two samples of each of `count` scenes."""
    rng = np.random.default_rng(seed)
    for index, scene in enumerate(scenes(seed, count, broken=True)):
        there = sorted(scene.kinds)
        image = {"type": "image_url", "image_url": {"url": _url(scene)}}
        for kind, answer in zip(
            (scene.missing[0], there[rng.integers(len(there))]), reversed(LABELS), strict=True
        ):
            text = {"type": "text", "text": presence(kind)}
            yield {
                "id": f"scene-{index}-{answer.lower()}",
                "messages": [{"role": "user", "content": [image, text]}],
                "answer": answer,
                "labels": LABELS,
                "split": "report" if index % 2 else "search",
            }


def _url(scene: Scene) -> str:
    file = io.BytesIO()
    draw(scene).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


if __name__ == "__main__":
    sys.exit(main())
