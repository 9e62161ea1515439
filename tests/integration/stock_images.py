"""Conversations with images on an engine without Trimtab; tokens and log-probabilities as JSON.

    python -m tests.integration.stock_images MODEL OUT.json FLAGS

`FLAGS` are the engine's arguments as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

# vLLM finds no plug-in of ours. Has to be said before vLLM is imported.
if __name__ == "__main__":
    os.environ["VLLM_PLUGINS"] = ""

from vllm import LLM, SamplingParams

from tests.integration.vision_cases import LONG, NEW_TOKENS, SHORT


def numbers(output: Any) -> dict[str, Any]:
    """What a test compares, bit for bit."""
    choice = output.outputs[0]
    prompt = [
        entry[token].logprob
        for token, entry in zip(
            output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True
        )
    ]
    made = [entry[t].logprob for t, entry in zip(choice.token_ids, choice.logprobs, strict=True)]
    return {"tokens": list(choice.token_ids), "prompt": prompt, "made": made}


if __name__ == "__main__":
    _, model, out, flags = sys.argv
    llm = LLM(model, enforce_eager=True, **json.loads(flags))
    params = SamplingParams(
        temperature=0, max_tokens=NEW_TOKENS, logprobs=0, prompt_logprobs=0, ignore_eos=True
    )
    results = [
        numbers(llm.chat(case.messages, params, use_tqdm=False)[0]) for case in (SHORT, LONG)
    ]
    with open(out, "w") as file:
        json.dump(results, file)
