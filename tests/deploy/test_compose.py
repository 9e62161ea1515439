"""Image and compose stack agree, publish on loopback only and pin what they pull."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "deploy" / "compose"
PROVISIONING = COMPOSE / "grafana" / "provisioning"
PINNED = re.compile(r"^[\w./-]+:v?\d+\.\d+\.\d+[\w.-]*(@sha256:[0-9a-f]{64})?$")


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.fixture(name="services")
def services_fixture() -> Any:
    return load(COMPOSE / "compose.yaml")["services"]


@pytest.fixture(name="stages")
def stages_fixture() -> dict[str, str]:
    """The Dockerfile's stages by name, each behind the text of the stages it is built from."""
    stages: dict[str, str] = {}
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    for block in re.split(r"^FROM ", text, flags=re.MULTILINE)[1:]:
        parent, name = re.match(r"(\S+) AS (\w+)\n", block).groups()  # type: ignore[union-attr]
        stages[name] = stages.get(parent, "") + block
    return stages


def mounts(service: dict[str, Any]) -> dict[str, str]:
    """Mount point -> volume name or path."""
    parts = [entry.split(":") for entry in service.get("volumes", [])]
    return {target: source for source, target, *_ in parts}


def published(service: dict[str, Any]) -> dict[str, str]:
    """Container port -> address it is published on."""
    parts = [entry.rsplit(":", 2) for entry in service.get("ports", [])]
    return {port: address for address, _, port in parts}


def seconds(text: str) -> int:
    return int(text.removesuffix("s"))


def test_every_port_is_published_on_loopback(services: dict[str, dict[str, Any]]) -> None:
    addresses = [published(service).values() for service in services.values()]
    assert set().union(*addresses) == {"127.0.0.1"}


def test_pulled_images_are_pinned(services: dict[str, dict[str, Any]]) -> None:
    pulled = [service["image"] for service in services.values() if "build" not in service]
    assert pulled
    assert [image for image in pulled if not PINNED.match(image)] == []


def test_base_images_are_pinned() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    images = dict(re.findall(r"^ARG (\w+_IMAGE)=(\S+)$", text, flags=re.MULTILINE))
    stages = set(re.findall(r" AS (\w+)$", text, flags=re.MULTILINE))
    used = set(re.findall(r"^FROM (\S+)", text, flags=re.MULTILINE)) - stages
    assert used == {f"${{{name}}}" for name in images}
    assert [image for image in images.values() if not PINNED.match(image)] == []


@pytest.mark.parametrize(
    "name", ["Dockerfile", "deploy/compose/compose.yaml", "deploy/kubernetes/trimtab.yaml"]
)
def test_no_latest_tag(name: str) -> None:
    assert ":latest" not in (ROOT / name).read_text(encoding="utf-8")


def test_mounted_paths_exist_and_volumes_are_declared(services: dict[str, dict[str, Any]]) -> None:
    sources = {source for service in services.values() for source in mounts(service).values()}
    paths = {source for source in sources if source.startswith(".")}
    assert [path for path in paths if not (COMPOSE / path).resolve().exists()] == []
    assert sources - paths == set(load(COMPOSE / "compose.yaml")["volumes"])


def test_the_built_target_is_the_default_stage(
    services: dict[str, dict[str, Any]], stages: dict[str, str]
) -> None:
    build = services["trimtab"]["build"]
    assert (COMPOSE / build["context"]).resolve() == ROOT
    assert build["target"] == list(stages)[-1]


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_image_runs_unprivileged_and_checks_its_health(stages: dict[str, str], target: str) -> None:
    stage = stages[target]
    assert re.findall(r"^USER (\S+)$", stage, flags=re.MULTILINE)[-1] == "10001:10001"
    assert re.search(
        r"^HEALTHCHECK .*\n.*http://127\.0\.0\.1:8000/health", stage, flags=re.MULTILINE
    )
    assert 'ENTRYPOINT ["trimtab"]' in stage
    assert "EXPOSE 8000\n" in stage
    assert "curl" not in stage


def test_the_cache_volume_is_the_home_of_the_image(
    services: dict[str, dict[str, Any]], stages: dict[str, str]
) -> None:
    for target in ("cpu", "cuda"):
        home = re.search(r"TRIMTAB_HOME=(\S+)", stages[target])
        assert home is not None
        assert mounts(services["trimtab"])[home.group(1)] == "trimtab-home"


def test_compose_waits_longer_than_the_drain(services: dict[str, dict[str, Any]]) -> None:
    flags = dict(flag.split("=", 1) for flag in services["trimtab"]["command"] if "=" in flag)
    assert seconds(services["trimtab"]["stop_grace_period"]) > int(flags["--shutdown-timeout"])


def test_prometheus_scrapes_the_server(services: dict[str, dict[str, Any]]) -> None:
    [job] = load(COMPOSE / "prometheus.yml")["scrape_configs"]
    [target] = job["static_configs"][0]["targets"]
    host, port = target.split(":")
    assert f"--port={port}" in services[host]["command"]
    assert port in published(services[host])
    assert job.get("metrics_path", "/metrics") == "/metrics"


def test_grafana_reads_prometheus_at_the_scrape_interval(
    services: dict[str, dict[str, Any]],
) -> None:
    [source] = load(PROVISIONING / "datasources" / "prometheus.yaml")["datasources"]
    host, port = source["url"].removeprefix("http://").split(":")
    assert port in published(services[host])
    interval = load(COMPOSE / "prometheus.yml")["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == interval


def test_grafana_provisions_the_dashboard(services: dict[str, dict[str, Any]]) -> None:
    [provider] = load(PROVISIONING / "dashboards" / "trimtab.yaml")["providers"]
    grafana = services["grafana"]
    folder = provider["options"]["path"]
    assert (COMPOSE / mounts(grafana)[folder] / "trimtab.json").exists()
    start_page = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert start_page == f"{folder}/trimtab.json"
    assert (COMPOSE / mounts(grafana)["/etc/grafana/provisioning"]).resolve() == PROVISIONING


def test_anonymous_grafana_users_only_view(services: dict[str, dict[str, Any]]) -> None:
    environment = services["grafana"]["environment"]
    assert environment["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
    assert environment["GF_AUTH_BASIC_ENABLED"] == "false"
    assert environment["GF_AUTH_DISABLE_LOGIN_FORM"] == "true"
