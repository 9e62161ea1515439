"""`trimtab profile` finds the heads that decide in a model whose weights are written by hand."""

import asyncio
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from calibrators.profiles import load
from server import cli
from server.evaluation.api import connected
from server.evaluation.samples import read
from server.profiling.questions import Entropy
from tests.fixtures import planted
from tests.integration.serving import serving

COUNT = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return planted.build(tmp_path_factory.mktemp("planted") / "model")


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log"
    flags = ("--dtype=float32", "--enforce-eager", f"--kv-cache-memory-bytes={2**28}")
    with serving(log, str(folder), *flags) as running:
        yield running


@pytest.fixture
def data(tmp_path):
    """Writes a data set."""

    def write(lines):
        file = tmp_path / "data.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return file

    return write


@pytest.fixture
def profile(server, tmp_path):
    """Runs the command against the server; returns the profile."""

    def run(method, data, *flags):
        out = tmp_path / "found.json"
        argv = ["profile", method, "--data", str(data), "--out", str(out), "--url", server.url]
        assert cli.main([*argv, "--max-tokens", "1", *flags]) == 0
        return load(out)

    return run


def test_zerotuning_finds_the_head_that_votes(profile, data):
    found = profile("zerotuning", data(planted.votes(COUNT)))

    assert found.parameters == {"gamma": 3.0, "heads": [planted.VOTING_HEAD]}
    assert (found.provenance.baseline.value, found.provenance.result.value) == (0.375, 1.0)
    assert found.model.architecture == "LlamaForCausalLM"
    assert found.provenance.search["report"]["verdict"].startswith("The profile helps")


def test_act_finds_the_head_with_the_sink(profile, data):
    found = profile("act", data(planted.claims(COUNT)), "--grid", "0.2,0.4,0.9")

    layer, head = planted.CLAIMING_LAYER, planted.CLAIMING_HEAD
    assert found.parameters == {"beta": 0.4, "heads": {str(layer): [head]}}
    assert (found.provenance.baseline.value, found.provenance.result.value) == (0.5, 1.0)


def test_entropy_is_that_of_the_next_token(server, folder, data):
    # All but one of the vocabulary's 21 words are told, so that nothing is lumped together.
    samples = read(data(planted.votes(8))).samples
    gamma = {"method": "zerotuning", "gamma": 1.0}

    async def measured():
        async with connected(server.url, trust_env=False) as api:
            return [
                (await Entropy(api).ask(sample, calibration))["entropy"]
                for sample in samples
                for calibration in (None, gamma)
            ]

    model, tokenizer = (c.from_pretrained(folder) for c in (AutoModelForCausalLM, AutoTokenizer))
    found = asyncio.run(measured())
    for index, sample in enumerate(samples):
        tokens = torch.tensor([tokenizer(sample.prompt)["input_ids"]])
        with torch.no_grad():
            logits = model(tokens).logits[0, -1]
        expected = torch.distributions.Categorical(logits=logits).entropy().item()
        assert found[2 * index : 2 * index + 2] == pytest.approx([expected] * 2, abs=1e-4)
