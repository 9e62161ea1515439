import os
import re

from server.overhead import machine


def test_the_facts_say_what_figures_were_measured_on():
    facts = machine.facts()

    assert facts["cores"] == len(os.sched_getaffinity(0))
    assert facts["memory_gib"] > 0
    assert re.fullmatch(r"3\.\d+\.\d+", facts["python"])
    assert "torch" in facts and "processor" in facts


def test_gpus_are_named_as_the_driver_names_them(monkeypatch, tmp_path):
    for bus, name in (("0", "NVIDIA H100"), ("1", "NVIDIA A10")):
        (tmp_path / bus).mkdir()
        (tmp_path / bus / "information").write_text(f"Model: \t\t {name}\nIRQ:   \t\t 5\n")
    monkeypatch.setattr(machine, "GPUS", tmp_path)

    assert machine.facts()["gpu"] == "NVIDIA H100, NVIDIA A10"


def test_without_gpus_none_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "GPUS", tmp_path / "nothing")

    assert "gpu" not in machine.facts()


def test_a_sentence_has_every_fact():
    assert machine.sentence({"cores": 2, "gpu": "x"}) == "cores 2, gpu x"
