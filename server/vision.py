"""What vision methods need of a prompt, checked when it is known."""

from __future__ import annotations

from collections.abc import Mapping

from calibrators.capabilities import reads_query
from calibrators.interface import Calibrator
from server.admission import Admitted, Refusal
from server.engine.geometry import Geometry


def check_images(
    calibrators: Mapping[str, Calibrator], admitted: Admitted, geometry: Geometry
) -> None:
    """Refuse a prompt without what its calibrations look at.

    Raises:
        Refusal: names the calibration and says what to do.
    """
    for bound, path in zip(admitted.bounds, admitted.paths, strict=True):
        calibrator = calibrators[bound.method]
        if calibrator.modality != "vision":
            continue
        if not geometry.prompt.images:
            raise Refusal(
                "no_image",
                path,
                f"{calibrator.title} needs an image, and this prompt has none: add an image_url "
                "part to a message of /v1/chat/completions, or leave out the calibration",
                bound.method,
            )
        if reads_query(calibrator) and not geometry.question:
            raise Refusal(
                "unsupported_feature",
                path,
                f"{calibrator.title} looks at the text of the last user message, which cannot be "
                "found among the tokens of this prompt: leave out truncate_prompt_tokens, or use "
                "a chat template that keeps the text as it is",
                bound.method,
            )
