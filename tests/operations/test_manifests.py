"""Kubernetes manifests and the compose file: valid, and no wider than they must be."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from throttle.daemon.config import load_config

ROOT = Path(__file__).resolve().parents[2]
KUBERNETES = ROOT / "docker" / "kubernetes"
VERSIONS = ("1.29", kubernetes_validate.latest_version())  # native sidecars came with 1.29
COMPOSE = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())

needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl")


def sources(folder):
    kustomization = yaml.safe_load((KUBERNETES / folder / "kustomization.yaml").read_text())
    for name in kustomization["resources"]:
        yield from yaml.safe_load_all((KUBERNETES / folder / name).read_text())


def built(folder):
    result = subprocess.run(
        ["kubectl", "kustomize", KUBERNETES / folder], capture_output=True, text=True, check=True
    )
    return list(yaml.safe_load_all(result.stdout))


def pod_of(folder, kind):
    (workload,) = [each for each in sources(folder) if each["kind"] == kind]
    return workload["spec"]["template"]["spec"]


PODS = {"node": pod_of("node", "DaemonSet"), "sidecar": pod_of("sidecar", "Deployment")}


def daemon_of(name):
    pod = PODS[name]
    containers = [*pod.get("initContainers", []), *pod["containers"]]
    return next(each for each in containers if each["name"] == "throttle")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("folder", ["node", "sidecar"])
def test_manifests_fit_the_published_schemas(folder, version):
    documents = list(sources(folder))
    assert len(documents) >= 3
    for document in documents:
        kubernetes_validate.validate(document, version, strict=True)


@needs_kubectl
@pytest.mark.parametrize("folder", ["node", "sidecar"])
def test_kustomize_builds_what_fits_the_schemas_too(folder):
    documents = built(folder)
    assert {"ConfigMap", "NetworkPolicy", "PodDisruptionBudget"} <= {
        document["kind"] for document in documents
    }
    for document in documents:
        kubernetes_validate.validate(document, VERSIONS[-1], strict=True)
        assert "moe-throttle\n" not in yaml.safe_dump(document), "an image without a version"


@needs_kubectl
def test_monitoring_selects_the_pods_and_their_port():
    monitor, rules = sorted(built("monitoring"), key=lambda each: each["kind"])
    assert (monitor["kind"], rules["kind"]) == ("PodMonitor", "PrometheusRule")
    labels = monitor["spec"]["selector"]["matchLabels"].items()
    for folder, kind in (("node", "DaemonSet"), ("sidecar", "Deployment")):
        (workload,) = [each for each in sources(folder) if each["kind"] == kind]
        assert labels <= workload["spec"]["template"]["metadata"]["labels"].items()
        assert {"name": "metrics", "containerPort": 9464} in daemon_of(folder)["ports"]
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert (endpoint["port"], endpoint["path"]) == ("metrics", "/metrics")
    assert rules["spec"] == yaml.safe_load((ROOT / "docker/prometheus/alerts.yaml").read_text())


@pytest.mark.parametrize("name", PODS)
def test_the_daemon_has_the_one_capability_that_it_needs_and_a_read_only_root(name):
    context = daemon_of(name)["securityContext"]
    assert context["capabilities"]["drop"] == ["ALL"]
    assert context["capabilities"]["add"] == ["SYS_ADMIN"]
    assert context["privileged"] is False
    assert context["readOnlyRootFilesystem"] is True
    pod = PODS[name]
    assert not pod.get("hostNetwork")
    assert not pod.get("hostPID")
    assert pod["automountServiceAccountToken"] is False


@pytest.mark.parametrize("name", PODS)
def test_probes_ask_the_daemon_and_liveness_no_driver(name):
    daemon = daemon_of(name)
    assert daemon["livenessProbe"]["httpGet"]["path"] == "/livez"
    assert daemon["startupProbe"]["httpGet"]["path"] == "/readyz"


def test_the_sidecar_is_native_and_starts_before_the_engine():
    (sidecar,) = PODS["sidecar"]["initContainers"]
    assert sidecar["restartPolicy"] == "Always"
    engine = PODS["sidecar"]["containers"][0]
    shared = {mount["name"] for mount in engine["volumeMounts"]}
    assert shared == {"socket"}


@pytest.mark.parametrize("path", ["node/gpu-node-0.toml", "sidecar/throttle.toml"])
def test_each_configuration_names_its_gpus_and_can_be_used(path):
    config = load_config({}, {}, KUBERNETES / path)
    assert config.gpus


def test_compose_gives_nobody_more_than_is_needed():
    services = COMPOSE["services"]
    ours = {name: each for name, each in services.items() if each["image"] == "moe-throttle"}
    assert set(ours) == {"volume", "gpus", "demo-engines", "demo-throttle", "throttle"}
    for name, service in ours.items():
        assert service["cap_drop"] == ["ALL"]
        assert set(service.get("cap_add", [])) == {
            "throttle": {"SYS_ADMIN"}, "volume": {"CHOWN"}
        }.get(name, set())  # fmt: skip
        assert "privileged" not in service
        assert service.get("read_only", name == "volume")
    for service in services.values():
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:")


def test_compose_reaches_what_it_names():
    services = COMPOSE["services"]
    for name, service in services.items():
        for other in service.get("depends_on", []):
            assert set(service["profiles"]) <= set(services[other]["profiles"]), name
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("./"):
                assert (ROOT / "docker" / source).exists()
            elif not source.startswith("/"):
                assert source in COMPOSE["volumes"]
    (job,) = yaml.safe_load((ROOT / "docker/prometheus/prometheus.yml").read_text())[
        "scrape_configs"
    ]
    assert job["static_configs"][0]["targets"] == ["throttle:9464"]
    assert job["job_name"] == "throttle"
