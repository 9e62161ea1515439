"""Links lead somewhere, and pages that list what the code defines list all of it."""

import re
from argparse import ArgumentParser
from pathlib import Path

import pytest

from benchmarks.throughput import IMAGES, SCENARIOS
from calibrators import registry
from calibrators.interface import ModelFacts
from calibrators.profiles import load
from server.admission import REASONS, Admission
from server.errors import INVALID_CALIBRATION
from server.evaluation.flags import add_eval
from server.limits import table
from server.metrics import OVERLOADED
from server.overhead.flags import add_bench
from server.presets import read
from server.serve import QUEUED_TOKENS, parse

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
CODES = (
    *("limit_exceeded", "not_allowed", "invalid_http", "invalid_api_key"),
    *("request_timeout", "body_too_large", "headers_too_large"),
)
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_resolve(page):
    targets = LINK.findall(page.read_text(encoding="utf-8"))

    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_every_page_is_linked_from_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    names = [page.relative_to(ROOT).as_posix() for page in PAGES[1:]]

    assert [page for page in names if f"({page})" not in readme] == []


@pytest.mark.parametrize(
    "name", [*REASONS, OVERLOADED, *CODES, INVALID_CALIBRATION, "calibration_not_applied"]
)
def test_the_errors_page_has_every_reason_and_code(name):
    assert f"`{name}`" in (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", ["docs/limits.md", "SECURITY.md"])
def test_pages_of_limits_have_the_table_of_the_code(page):
    assert f"\n\n{table()}\n\n" in (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", ["docs/limits.md", "SECURITY.md"])
def test_pages_of_limits_have_the_defaults_of_other_flags(page):
    args = parse([])
    bounds = {
        "--max-calibrations-per-request": args.max_calibrations_per_request,
        "--h11-max-incomplete-event-size": args.h11_max_incomplete_event_size,
        "--h11-max-header-count": args.h11_max_header_count,
        "--max-num-queued-tokens": QUEUED_TOKENS,
    }
    text = (ROOT / page).read_text(encoding="utf-8")

    for flag, bound in bounds.items():
        assert re.findall(rf"`{flag}` \(([\d,]*\d)", text) == [f"{bound:,}"]


@pytest.mark.parametrize("name", [*SCENARIOS, *IMAGES])
def test_the_benchmarks_page_has_every_scenario(name):
    assert f"`{name}`" in (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "add", "page"),
    [("bench", add_bench, "benchmarks.md"), ("eval", add_eval, "evaluation.md")],
)
def test_pages_of_commands_have_every_flag_and_no_other(name, add, page):
    commands = ArgumentParser(prog="trimtab").add_subparsers()
    flags = set(re.findall(r"--[a-z-]+", add(commands).format_usage()))
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    (usage,) = re.findall(rf"^    trimtab {name} (?:.*\n)+?\n", text, re.MULTILINE)

    assert set(re.findall(r"--[a-z-]+", usage)) == flags


def test_the_programs_in_the_readme_compile():
    found = re.findall(r"```python\n(.*?)```", PAGES[0].read_text(encoding="utf-8"), re.DOTALL)

    assert len(found) == 2
    for code in found:
        compile(code, "README.md", "exec")


def test_the_files_on_the_profiles_page_are_what_they_should_be(tmp_path):
    page = (ROOT / "docs" / "profiles.md").read_text(encoding="utf-8")
    (content,) = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    (toml,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "smollm2-reviews.json").write_text(content)
    (tmp_path / "presets.toml").write_text(toml)
    profile = load(tmp_path / "smollm2-reviews.json")
    facts = ModelFacts(
        "LlamaForCausalLM", 30, 9, 3, 64, 576, 2048, config_hash=profile.model.config_hash
    )
    presets = read(tmp_path / "presets.toml")
    admission = Admission(
        registry.load(), facts, "m", profiles={profile.name: profile}, presets=presets
    )
    assert admission.admit("reviews").bounds[0].params["heads"] == [1, 4]
