"""deploy/: what Kubernetes gets of it, against its own schemas, and against what the service understands."""

from __future__ import annotations

import copy
import inspect
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from idemp import Consumer
from svc.settings import read
from tests.service import ROOT
from tests.test_compose import said

DEPLOY = ROOT / "deploy"
ALL, DEMO, KEDA = DEPLOY / "all", DEPLOY / "overlays/demo", DEPLOY / "overlays/keda"
SERVICES = ("orders", "notify")
KNOWN = {"apiVersion", "kind", "resources", "labels", "patches", "namespace"}
CLUSTER_WIDE = ("Namespace",)
Resource = dict[str, Any]


# ------------------------------------------------------------------ what kustomize makes of it


def built(folder: Path) -> list[Resource]:
    """The resources of a kustomization: those words of kustomize that deploy/ uses."""
    told = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert told.keys() <= KNOWN, "teach this test the new word, or leave it out"
    found: list[Resource] = []
    for name in told["resources"]:
        place = (folder / name).resolve()
        found += built(place) if place.is_dir() else list(yaml.safe_load_all(place.read_text()))
    for resource in found:
        for each in told.get("labels", ()):
            assert each["includeSelectors"]
            _label(resource, each["pairs"])
        if "namespace" in told and resource["kind"] not in CLUSTER_WIDE:
            resource["metadata"]["namespace"] = told["namespace"]
        for patch in told.get("patches", ()):
            if _is_target(resource, patch["target"]):
                _patch(resource, yaml.safe_load(patch["patch"]))
    return copy.deepcopy(found)


def _label(resource: Resource, pairs: dict[str, str]) -> None:
    resource["metadata"].setdefault("labels", {}).update(pairs)
    spec = resource.get("spec", {})
    if "selector" in spec:
        spec["selector"]["matchLabels"].update(pairs)
    if "template" in spec:
        spec["template"]["metadata"]["labels"].update(pairs)


def _is_target(resource: Resource, target: dict[str, str]) -> bool:
    names = {"name": resource["metadata"]["name"], "kind": resource["kind"]}
    return all(names[word] == value for word, value in target.items())


def _patch(resource: Resource, operations: list[dict[str, Any]]) -> None:
    for operation in operations:
        *path, last = operation["path"].split("/")[1:]
        place = resource
        for step in path:
            place = place[step]
        if operation["op"] == "remove":
            del place[last]
        else:
            assert operation["op"] == "replace"
            assert last in place
            place[last] = operation["value"]


def by_name(resources: list[Resource]) -> dict[tuple[str, str], Resource]:
    found = {(each["kind"], each["metadata"]["name"]): each for each in resources}
    assert len(found) == len(resources)
    return found


if shutil.which("kubectl"):

    @pytest.mark.parametrize("folder", [ALL, DEMO, KEDA], ids=lambda folder: folder.name)
    def test_kustomize_makes_the_same_of_it(folder: Path) -> None:
        """Where kubectl is at hand: what this file reads is what it would apply."""
        done = subprocess.run(
            ["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert by_name(list(yaml.safe_load_all(done.stdout))) == by_name(built(folder))


# ------------------------------------------------------------------ schemas


@pytest.mark.parametrize("version", ["1.29", "1.33"])
@pytest.mark.parametrize("folder", [ALL, DEMO], ids=lambda folder: folder.name)
def test_kubernetes_understands_it(folder: Path, version: str) -> None:
    """Every word is in its schema, and no other."""
    for resource in built(folder):
        kubernetes_validate.validate(resource, version, strict=True)


def test_a_wrong_word_would_be_noticed() -> None:
    """The schemas are strict."""
    deployment = by_name(built(ALL))["Deployment", "orders"]
    deployment["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readynessProbe"):
        kubernetes_validate.validate(deployment, "1.29", strict=True)


SCALED = {"scaleTargetRef", "minReplicaCount", "maxReplicaCount", "cooldownPeriod", "triggers"}
RABBITMQ = {"protocol", "queueName", "mode", "value"}


def test_keda_understands_the_rest() -> None:
    """Its words are not Kubernetes' own: the essentials of its documentation of the RabbitMQ scaler."""
    resources = by_name(built(KEDA))
    login = resources["TriggerAuthentication", "idemp-broker"]
    [secret] = login["spec"]["secretTargetRef"]
    assert secret == {"parameter": "host", "name": "idemp", "key": "transport"}
    for name in SERVICES:
        scaled = resources["ScaledObject", name]
        assert scaled["apiVersion"] == login["apiVersion"] == "keda.sh/v1alpha1"
        assert scaled["spec"].keys() == SCALED
        assert scaled["spec"]["scaleTargetRef"] == {"name": name}
        assert 1 <= scaled["spec"]["minReplicaCount"] < scaled["spec"]["maxReplicaCount"]
        [trigger] = scaled["spec"]["triggers"]
        assert (trigger["type"], trigger["metadata"].keys()) == ("rabbitmq", RABBITMQ)
        assert trigger["metadata"]["mode"] in ("QueueLength", "MessageRate")
        assert all(isinstance(value, str) for value in trigger["metadata"].values())
        assert trigger["metadata"]["queueName"] == Consumer(_nobody(), service=name).queue
        assert trigger["authenticationRef"] == {"name": "idemp-broker"}
        # Who else says how many there are, would take turns with KEDA.
        assert "replicas" not in resources["Deployment", name]["spec"]
        kubernetes_validate.validate(resources["Deployment", name], "1.29", strict=True)


def _nobody() -> Any:
    from idemp import open_transport

    return open_transport("memory://nobody")


# ------------------------------------------------------------------ what is in it


def container(name: str, folder: Path = ALL) -> dict[str, Any]:
    [only] = by_name(built(folder))["Deployment", name]["spec"]["template"]["spec"]["containers"]
    found: dict[str, Any] = only
    return found


@pytest.mark.parametrize("name", SERVICES)
def test_each_service_is_itself(name: str) -> None:
    """Its label, its selectors, its name in the environment: nobody selects the other's."""
    resources = by_name(built(ALL))
    deployment, budget = resources["Deployment", name], resources["PodDisruptionBudget", name]
    label = {"app.kubernetes.io/name": name, "app.kubernetes.io/part-of": "idemp"}
    for selector in (deployment["spec"]["selector"], budget["spec"]["selector"]):
        assert selector["matchLabels"] == label
    assert deployment["spec"]["template"]["metadata"]["labels"] == label
    [service] = [each for each in container(name)["env"] if each["name"] == "SERVICE_NAME"]
    assert service["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.labels['app.kubernetes.io/name']"


@pytest.mark.parametrize("name", SERVICES)
def test_the_service_understands_its_settings(name: str) -> None:
    """With the demo's Secret, as Kubernetes would put it together."""
    resources = by_name(built(DEMO))
    settings: dict[str, str] = {}
    for each in container(name, DEMO)["env"]:
        match each:
            case {"name": variable, "value": value}:
                settings[variable] = re.sub(r"\$\((\w+)\)", lambda other: settings[other[1]], value)
            case {"name": variable, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}}:
                settings[variable] = resources["Secret", secret]["stringData"][key]
            case {"name": variable, "valueFrom": {"configMapKeyRef": {"name": settings_map, "key": key}}}:
                settings[variable] = resources["ConfigMap", settings_map]["data"][key]
            case {"name": variable, "valueFrom": {"fieldRef": _}}:
                settings[variable] = name
    understood = read(settings)
    assert (understood.service, understood.store) == (name, f"etcd://etcd:2379/{name}?retention=24h")
    assert understood.transport == "amqp://guest:guest@rabbitmq:5672/"
    ports = {each["name"]: each["containerPort"] for each in container(name)["ports"]}
    assert ports == {"health": understood.health_port, "metrics": understood.metrics_port}


@pytest.mark.parametrize("name", SERVICES)
def test_it_is_confined(name: str) -> None:
    """No root, nothing to write to but /tmp, no capability, limits; and it may finish its handlers."""
    pod = by_name(built(ALL))["Deployment", name]["spec"]["template"]["spec"]
    [user] = said("USER")
    assert pod["securityContext"]["runAsNonRoot"]
    assert f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}" == user
    assert not pod["automountServiceAccountToken"]
    grace = inspect.signature(Consumer).parameters["grace"].default
    assert pod["terminationGracePeriodSeconds"] > grace
    one = container(name)
    assert one["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert one["resources"]["limits"].keys() == {"cpu", "memory"}
    assert [mount["mountPath"] for mount in one["volumeMounts"]] == ["/tmp"]


@pytest.mark.parametrize("name", SERVICES)
def test_its_probes_ask_what_the_service_answers(name: str) -> None:
    """Ready decides on traffic and on the start; live alone may kill it."""
    one = container(name)
    asked = {probe: one[probe]["httpGet"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert {probe: get["path"] for probe, get in asked.items()} == {
        "startupProbe": "/ready",
        "livenessProbe": "/live",
        "readinessProbe": "/ready",
    }
    assert {get["port"] for get in asked.values()} == {"health"}


def test_no_secret_is_in_it() -> None:
    """But the demo's, which every broker has at first."""
    for file in DEPLOY.rglob("*.yaml"):
        if file != DEMO / "secret.yaml":
            assert not re.search(r"//\S+:\S+@", file.read_text()), file
    assert "Secret" not in {each["kind"] for each in built(ALL) + built(KEDA)}
    urls = by_name(built(DEMO))["Secret", "idemp"]["stringData"]
    assert "guest:guest" in json.dumps(urls)
