"""The manifest's promises: probes that exist, time for the drain, a pod without privileges."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
MANIFEST = ROOT / "deploy" / "kubernetes" / "trimtab.yaml"


@pytest.fixture(name="objects")
def objects_fixture() -> dict[str, Any]:
    documents: list[dict[str, Any]] = list(yaml.safe_load_all(MANIFEST.read_text(encoding="utf-8")))
    assert [document["kind"] for document in documents] == ["Deployment", "Service"]
    return {document["kind"]: document for document in documents}


@pytest.fixture(name="pod")
def pod_fixture(objects: dict[str, Any]) -> Any:
    return objects["Deployment"]["spec"]["template"]["spec"]


@pytest.fixture(name="container")
def container_fixture(pod: dict[str, Any]) -> Any:
    [container] = pod["containers"]
    return container


@pytest.fixture(name="flags")
def flags_fixture(container: dict[str, Any]) -> dict[str, str]:
    command, *flags = container["args"]
    assert command == "serve"
    return dict(flag.split("=", 1) for flag in flags)


def image_setting(pattern: str) -> set[str]:
    return set(
        re.findall(pattern, (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    )


@pytest.mark.parametrize(
    ("probe", "path"),
    [("startupProbe", "/health"), ("livenessProbe", "/health"), ("readinessProbe", "/ready")],
)
def test_probes(container: dict[str, Any], probe: str, path: str) -> None:
    assert container[probe]["httpGet"] == {"path": path, "port": "http"}


def test_startup_has_ten_minutes(container: dict[str, Any]) -> None:
    probe = container["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 600


def test_grace_period_exceeds_pre_stop_and_drain(
    pod: dict[str, Any], container: dict[str, Any], flags: dict[str, str]
) -> None:
    pre_stop = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pre_stop >= 15
    assert pod["terminationGracePeriodSeconds"] > pre_stop + int(flags["--shutdown-timeout"])


def test_pod_is_unprivileged(pod: dict[str, Any]) -> None:
    context = pod["securityContext"]
    assert context["runAsNonRoot"] is True
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert image_setting(r"^USER (\S+)$") == {f"{context['runAsUser']}:{context['runAsGroup']}"}


def test_containers_drop_every_capability(pod: dict[str, Any]) -> None:
    for container in pod["initContainers"] + pod["containers"]:
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}


def test_service_variables_do_not_become_settings(pod: dict[str, Any]) -> None:
    assert pod["enableServiceLinks"] is False


def test_volumes(pod: dict[str, Any], container: dict[str, Any]) -> None:
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert set(mounts.values()) == set(volumes)
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    [home] = image_setting(r"TRIMTAB_HOME=(\S+)")
    assert home in mounts


def test_the_image_seeds_the_home_volume(pod: dict[str, Any], container: dict[str, Any]) -> None:
    [seed] = pod["initContainers"]
    [home] = image_setting(r"TRIMTAB_HOME=(\S+)")
    [mount] = seed["volumeMounts"]
    assert seed["image"] == container["image"]
    assert seed["command"][-2:] == [f"{home}/.", f"{mount['mountPath']}/"]
    assert mount["name"] in {
        entry["name"] for entry in container["volumeMounts"] if entry["mountPath"] == home
    }


def test_images_carry_the_version_of_this_tree(pod: dict[str, Any]) -> None:
    source = (ROOT / "server" / "__init__.py").read_text(encoding="utf-8")
    [version] = re.findall(r'^__version__ = "(.+)"$', source, flags=re.MULTILINE)
    images = {container["image"] for container in pod["initContainers"] + pod["containers"]}
    assert images == {f"trimtab:{version}"}


def test_service_reaches_the_pod(
    objects: dict[str, Any], container: dict[str, Any], flags: dict[str, str]
) -> None:
    service = objects["Service"]["spec"]
    labels = objects["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert service["selector"].items() <= labels.items()
    assert objects["Deployment"]["spec"]["selector"]["matchLabels"].items() <= labels.items()
    [port] = container["ports"]
    assert service["ports"][0]["targetPort"] == port["name"] == "http"
    assert flags["--port"] == str(port["containerPort"])
    assert flags["--host"] == "0.0.0.0"
