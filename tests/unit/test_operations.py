"""What docs/operations/ offers: each file is accepted by the tool that it is for."""

from __future__ import annotations

import json
import plistlib
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes_validate import validate

from fakes.certificates import Authority
from mlxpool_server.settings import Settings, load_settings

OPERATIONS = Path(__file__).parents[2] / "docs" / "operations"
MANIFEST = OPERATIONS / "kubernetes" / "mlxpool.yaml"
UNIT = OPERATIONS / "systemd" / "mlxpool.service"
PLIST = OPERATIONS / "launchd" / "io.mlxpool.server.plist"
DASHBOARD = OPERATIONS / "grafana" / "mlxpool.json"
PATIENCE_S = 60
# What a stop takes beyond drain_grace_s: see the constants of app.py.
REST_OF_STOP_S = 11
# Exit codes that a restart does not mend.
WRONG_USAGE = {"64", "78"}


def tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def resources() -> dict[str, Any]:
    return {each["kind"]: each for each in yaml.safe_load_all(MANIFEST.read_text())}


def container() -> dict[str, Any]:
    pod = resources()["Deployment"]["spec"]["template"]["spec"]
    (found,) = pod["containers"]
    return dict(found)


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    """systemd-analyze verify has nothing to say, once the command is one that is here."""
    unit = tmp_path / UNIT.name
    # By a path without spaces, wherever the project lies.
    command = tmp_path / "mlxpool"
    command.symlink_to(sys.executable)
    unit.write_text(UNIT.read_text().replace("/opt/mlxpool/bin/mlxpool", str(command)))
    verify = subprocess.run(
        [tool("systemd-analyze"), "verify", str(unit)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert (verify.returncode, verify.stderr) == (0, "")


def test_systemd_waits_for_a_drain() -> None:
    """The unit's patience outlasts the default drain, and wrong usage is not tried again."""
    settings = dict(re.findall(r"^(\w+)=(.*)$", UNIT.read_text(), re.MULTILINE))
    assert int(settings["TimeoutStopSec"]) > Settings().drain_grace_s + REST_OF_STOP_S
    assert set(settings["RestartPreventExitStatus"].split()) == WRONG_USAGE
    assert settings["ExecReload"].startswith("/bin/kill -HUP")


def test_launchd_can_read_the_plist() -> None:
    """It is a property list, and its patience outlasts the default drain."""
    plist = plistlib.loads(PLIST.read_bytes())
    assert plist["Label"] == PLIST.stem
    assert plist["ExitTimeOut"] > Settings().drain_grace_s + REST_OF_STOP_S
    assert plist["KeepAlive"] == {"SuccessfulExit": False}


def test_launchd_accepts_the_plist() -> None:
    """By its own linter, on a Mac."""
    command = [tool("plutil"), "-lint", str(PLIST)]
    subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE_S)


@pytest.mark.parametrize("kind", ["ConfigMap", "Deployment", "Service"])
def test_kubernetes_accepts_the_manifest(kind: str) -> None:
    """Each resource fits the API's schema, with no field that it does not know."""
    validate(resources()[kind], "1.37", strict=True)


def test_the_manifests_settings_are_ours(tmp_path: Path) -> None:
    """The file in its ConfigMap loads, and Kubernetes waits for longer than it drains."""
    text = resources()["ConfigMap"]["data"]["mlxpool.toml"]
    file = tmp_path / "mlxpool.toml"
    file.write_text(text)
    settings = load_settings(file, {}, {})
    assert set(tomllib.loads(text)) <= set(Settings.model_fields)
    pod = resources()["Deployment"]["spec"]["template"]["spec"]
    (_, pre_stop_s) = container()["lifecycle"]["preStop"]["exec"]["command"]
    patience_s = pod["terminationGracePeriodSeconds"] - int(pre_stop_s)
    assert patience_s > settings.drain_grace_s + REST_OF_STOP_S


def test_the_manifests_ports_are_those_it_listens_on() -> None:
    """Ports, probes and settings name the same ones."""
    settings = tomllib.loads(resources()["ConfigMap"]["data"]["mlxpool.toml"])
    ports = {each["name"]: each["containerPort"] for each in container()["ports"]}
    tcp, socket = settings["listen"]
    assert tcp.endswith(f":{ports['grpc']}")
    assert settings["metrics_listen"].endswith(f":{ports['metrics']}")
    probe = container()["readinessProbe"]["exec"]["command"]
    assert probe[-1].removeprefix("-addr=unix://") == socket.removeprefix("unix:")


def test_prometheus_accepts_the_configuration(tmp_path: Path) -> None:
    """Promtool finds no fault in the configuration and in the alerts that it names."""
    folder = tmp_path / "prometheus"
    shutil.copytree(OPERATIONS / "prometheus", folder)
    # It looks whether they are there.
    (folder / "mlxpool-ca.crt").write_bytes(Authority().pem)
    (folder / "mlxpool-key").write_text("a key")
    command = [tool("promtool"), "check", "config", "prometheus.yml"]
    subprocess.run(command, check=True, cwd=folder, capture_output=True, timeout=PATIENCE_S)


def test_the_alerts_fire_when_they_should() -> None:
    """Promtool runs each alert against series that are made up."""
    folder = OPERATIONS / "prometheus"
    command = [tool("promtool"), "test", "rules", "alerts_test.yml"]
    subprocess.run(command, check=True, cwd=folder, capture_output=True, timeout=PATIENCE_S)


def test_every_alert_is_tried() -> None:
    """No alert without a made-up case in which it fires."""
    rules = yaml.safe_load((OPERATIONS / "prometheus" / "alerts.yml").read_text())
    cases = yaml.safe_load((OPERATIONS / "prometheus" / "alerts_test.yml").read_text())
    alerts = {rule["alert"] for group in rules["groups"] for rule in group["rules"]}
    tried = {
        case["alertname"]
        for test in cases["tests"]
        for case in test["alert_rule_test"]
        if "exp_alerts" in case
    }
    assert alerts == tried


def test_the_dashboard_is_one() -> None:
    """JSON with panels whose ids are unique and which do not overlap."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        area = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & area, panel["title"]
        cells |= area
        assert all(target["expr"] for target in panel["targets"])
