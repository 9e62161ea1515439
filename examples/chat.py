"""One question to a running server, first plain, then calibrated: `python examples/chat.py`."""

import json
import sys

from openai import OpenAI

CALIBRATION = {"method": "zerotuning", "gamma": 0.2}
client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")

for calibration in ("none", CALIBRATION):
    answer = client.chat.completions.create(
        model="smollm2-135m-instruct",
        messages=[{"role": "user", "content": "Name three colours of the rainbow."}],
        temperature=0,
        max_tokens=24,
        extra_body={"calibration": calibration},
    )
    receipt = (answer.model_extra or {}).get("calibration")
    sys.stdout.write(f"{json.dumps(calibration)}\n  {answer.choices[0].message.content}\n")
    if receipt is not None:
        sys.stdout.write(f"  {json.dumps(receipt, indent=2)}\n")
