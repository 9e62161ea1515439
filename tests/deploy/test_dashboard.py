"""The dashboard queries only metrics and labels that exist, and in ways that give true numbers."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana" / "trimtab.json"
HISTOGRAM_SUFFIX = re.compile(r"_(bucket|sum|count)$")

OWN = {
    "trimtab_requests_total": {"calibrator", "outcome"},
    "trimtab_calibrated_tokens_total": {"calibrator", "phase"},
    "trimtab_rejections_total": {"reason"},
    "trimtab_calibration_seconds": {"calibrator"},
    "trimtab_active_requests": {"calibrator"},
    "trimtab_sink_mass_ratio": {"calibrator", "when"},
    "trimtab_profile_loads_total": {"outcome"},
    "trimtab_build_info": {"version", "vllm_version", "device"},
}
VLLM = {
    name: {"model_name", "engine"}
    for name in (
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:request_success_total",
        "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total",
        "vllm:time_to_first_token_seconds",
        "vllm:inter_token_latency_seconds",
        "vllm:e2e_request_latency_seconds",
        "vllm:prefix_cache_queries_total",
        "vllm:prefix_cache_hits_total",
        "vllm:num_preemptions_total",
    )
}
HISTOGRAMS = {
    "trimtab_calibration_seconds",
    "trimtab_sink_mass_ratio",
    "vllm:time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds",
    "vllm:e2e_request_latency_seconds",
}
SCRAPE_LABELS = {"instance", "job", "le"}


def family(name: str) -> str:
    base = HISTOGRAM_SUFFIX.sub("", name)
    return base if base in HISTOGRAMS else name


def metric_names(expression: str) -> set[str]:
    """The series in a PromQL expression: what selectors, groupings and functions leave over."""
    bare = re.sub(r'"[^"]*"|\[[^]]*\]', "", expression)
    bare = re.sub(r"\{[^}]*\}", "", bare)
    bare = re.sub(r"\b(by|without|on|ignoring)\s*\([^)]*\)", "", bare)
    names = re.findall(r"(?<![\w.:])[A-Za-z_:][\w:]*\b(?!\s*\()", bare)
    return set(names) - {"and", "or", "unless", "sum", "min", "max", "count"}


def labels_used(expression: str) -> set[str]:
    selectors = " ".join(re.findall(r"\{([^}]*)\}", expression))
    groupings = " ".join(re.findall(r"\bby\s*\(([^)]*)\)", expression))
    return set(re.findall(r"(\w+)\s*[=!]~?", selectors)) | set(re.findall(r"\w+", groupings))


def queries(board: dict[str, Any]) -> Iterator[str]:
    for panel in board["panels"]:
        yield from (target["expr"] for target in panel.get("targets", []))


BOARD = json.loads(DASHBOARD.read_text(encoding="utf-8"))
EXPRESSIONS = list(queries(BOARD))


def test_metric_names_are_read_out_of_promql() -> None:
    expression = (
        'histogram_quantile(0.99, sum by (le, a) (rate(x_seconds_bucket{b=~"$b"}[5m])))'
        " / max by (c) (ns:y) or z_total"
    )
    assert metric_names(expression) == {"x_seconds_bucket", "ns:y", "z_total"}
    assert labels_used(expression) == {"le", "a", "b", "c"}


def test_own_metrics_are_those_of_the_server() -> None:
    metrics = pytest.importorskip("server.metrics")
    assert set(OWN) == metrics.FAMILIES


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_metrics_and_labels_exist(expression: str) -> None:
    known = OWN | VLLM
    families = {family(name) for name in metric_names(expression)}
    assert families
    assert families - set(known) == set()
    assert labels_used(expression) - SCRAPE_LABELS <= set.union(*(known[name] for name in families))


def test_every_own_metric_is_shown() -> None:
    shown = {family(name) for expression in EXPRESSIONS for name in metric_names(expression)}
    assert set(OWN) - shown == set()


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_counters_are_rates_over_the_rate_interval(expression: str) -> None:
    suffixes = ("_total", "_bucket", "_sum", "_count")
    counters = {name for name in metric_names(expression) if name.endswith(suffixes)}
    for name in counters:
        assert re.search(rf"\brate\({name}(\{{[^}}]*\}})?\[\$__rate_interval\]\)", expression)
    assert expression.count("[") == expression.count("[$__rate_interval]") == len(counters)


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_quantiles_come_from_summed_buckets_and_nothing_is_averaged(expression: str) -> None:
    summed = r"histogram_quantile\(0\.\d+, sum by \(le\b[^)]*\) \(rate\([\w:]+_bucket"
    assert expression.count("histogram_quantile") == len(re.findall(summed, expression))
    assert "avg" not in expression


def test_variables_are_declared_and_used() -> None:
    declared = {variable["name"] for variable in BOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(BOARD["panels"]))) - {"__rate_interval"}
    assert declared == used == {"DS_PROMETHEUS", "model_name", "calibrator"}


def test_every_query_follows_the_data_source_variable() -> None:
    panels = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
    sources = [panel["datasource"] for panel in panels]
    sources += [target["datasource"] for panel in panels for target in panel["targets"]]
    assert {source["uid"] for source in sources} == {"${DS_PROMETHEUS}"}


def test_identity_and_layout() -> None:
    panels = BOARD["panels"]
    assert BOARD["uid"] == "trimtab"
    rows = [panel["title"] for panel in panels if panel["type"] == "row"]
    assert rows == ["Traffic", "Calibration", "Engine"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for grid in (panel["gridPos"] for panel in panels)
        for x in range(grid["x"], grid["x"] + grid["w"])
        for y in range(grid["y"], grid["y"] + grid["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
