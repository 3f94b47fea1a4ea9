"""The real Prometheus, configured as in our example, scrapes a real server over TLS with a key.

It loads our alerts and knows what the dashboard asks for.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from e2e.server_process import ROOT, STOP_TIMEOUT_S, ServerProcess
from fakes.certificates import Authority
from mlxpool_client import Client, Tls
from mlxpool_server.rpc.access.keys import hash_of, new_key

PATIENCE_S = 60
USER_KEY, SCRAPER_KEY = new_key(), new_key()
OPERATIONS = ROOT / "docs" / "operations"


class Prometheus:
    """One process on a port that the kernel picks; asked over its HTTP API."""

    def __init__(self, folder: Path, target: str) -> None:
        self._log_file = folder / "prometheus.log"
        config = yaml.safe_load((OPERATIONS / "prometheus" / "prometheus.yml").read_text())
        config["global"] |= {"scrape_interval": "2s", "evaluation_interval": "1s"}
        config["rule_files"] = [str(OPERATIONS / "prometheus" / "alerts.yml")]
        # Its certificate and key lie beside it, under the names that the example has.
        config["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
        config_file = folder / "prometheus.yml"
        config_file.write_text(yaml.safe_dump(config))
        command = [
            str(shutil.which("prometheus")),
            f"--config.file={config_file}",
            f"--storage.tsdb.path={folder / 'data'}",
            "--web.listen-address=127.0.0.1:0",
        ]
        with self._log_file.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)

    @property
    def address(self) -> str:
        found = re.search(r'msg="Listening on".* address=(\S+)', self._log_file.read_text())
        return found[1] if found else ""

    def ask(self, path: str, **parameters: str) -> Any:
        """The answer's data. Raises: OSError while it does not listen, or for a wrong query."""
        url = f"http://{self.address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=PATIENCE_S) as response:
            return json.load(response)["data"]

    def wait_for(self, path: str, found: Any, **parameters: str) -> Any:
        """What `found` makes of the answer, once that is something."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline and self.process.poll() is None:
            # 503 is what it answers before it is ready.
            with contextlib.suppress(urllib.error.HTTPError):
                if self.address and (result := found(self.ask(path, **parameters))):
                    return result
            time.sleep(0.05)
        last = self.ask(path, **parameters)
        raise AssertionError(f"{path}: {last}; the log:\n{self._log_file.read_text()}")

    def query(self, expression: str) -> list[Any]:
        return list(self.ask("query", query=expression)["result"])


def guards(folder: Path) -> list[str]:
    """Write certificates and keys; return the server's flags for them."""
    authority = Authority()
    certificate, key = authority.issue().write(folder)
    (folder / "mlxpool-ca.crt").write_bytes(authority.pem)
    (folder / "mlxpool-key").write_text(f"{SCRAPER_KEY}\n")
    keys_file = folder / "keys.toml"
    keys_file.write_text(
        "".join(
            f'[[keys]]\nname = "{role}"\nsha256 = "{hash_of(key)}"\nroles = ["{role}"]\n'
            for role, key in (("inference", USER_KEY), ("observer", SCRAPER_KEY))
        )
    )
    files = {"--tls-certificate": certificate, "--tls-key": key, "--api-keys-file": keys_file}
    flags = [text for flag, file in files.items() for text in (flag, str(file))]
    return ["--metrics-listen", "127.0.0.1:0", *flags]


@pytest.fixture(scope="module")
def prometheus(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """It has scraped a server that has answered one request."""
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed; scripts/install-prometheus does it")
    folder = tmp_path_factory.mktemp("prometheus")
    with ServerProcess(folder / "log.jsonl", *guards(folder)) as server:
        with (
            Client(
                server.address,
                tls=Tls(folder / "mlxpool-ca.crt"),
                api_key=USER_KEY,
                timeout_s=PATIENCE_S,
            ) as client,
            client.generate("demo", "One, two,", max_tokens=8, ignore_eos=True) as stream,
        ):
            assert list(stream)
        started = Prometheus(folder, str(server.wait_for("metrics.listening")["address"]))
        try:
            query = "mlxpool_completion_tokens_total"
            started.wait_for("query", lambda data: data["result"], query=query)
            yield started
        finally:
            started.process.terminate()
            started.process.wait(STOP_TIMEOUT_S)


def test_it_scrapes(prometheus: Prometheus) -> None:
    """The target is up, and what the request did is in its database."""

    def is_up(data: Any) -> bool:
        return [each["health"] for each in data["activeTargets"]] == ["up"]

    prometheus.wait_for("targets", is_up)
    (tokens,) = prometheus.query('mlxpool_completion_tokens_total{model="demo"}')
    assert tokens["value"][1] == "8"
    (requests,) = prometheus.query('mlxpool_requests_total{status="OK"}')
    assert (requests["metric"]["model"], requests["value"][1]) == ("demo", "1")


def test_it_loads_the_alerts(prometheus: Prometheus) -> None:
    """All of them were evaluated without an error, and none fires for a healthy server."""

    def evaluated(data: Any) -> list[Any]:
        rules = [rule for group in data["groups"] for rule in group["rules"]]
        return rules if all(rule["health"] != "unknown" for rule in rules) else []

    rules = prometheus.wait_for("rules", evaluated)
    assert {rule["health"] for rule in rules} == {"ok"}
    # A scrape may have been late: pending is not firing.
    assert "firing" not in {rule["state"] for rule in rules}
    written = yaml.safe_load((OPERATIONS / "prometheus" / "alerts.yml").read_text())["groups"]
    assert len(rules) == sum(len(group["rules"]) for group in written)


def test_it_understands_the_dashboard(prometheus: Prometheus) -> None:
    """Every panel's query parses, and asks for metrics that the server has."""
    names = set(prometheus.ask("label/__name__/values"))
    text = (OPERATIONS / "grafana" / "mlxpool.json").read_text()
    expressions = [
        target["expr"] for panel in json.loads(text)["panels"] for target in panel["targets"]
    ]
    variables = {"$instance": ".*", "$model": ".*", "$__rate_interval": "1m"}
    for expression in expressions:
        filled = re.sub(r"\$\w+", lambda match: variables[match[0]], expression)
        prometheus.query(filled)
    used = set(re.findall(r"\b(?:mlxpool|process)_\w+", " ".join(expressions)))
    assert used - names == set()


def test_every_alert_asks_for_metrics_that_are_there(prometheus: Prometheus) -> None:
    """A renamed metric would silence its alert for ever."""
    names = set(prometheus.ask("label/__name__/values"))
    groups = yaml.safe_load((OPERATIONS / "prometheus" / "alerts.yml").read_text())["groups"]
    text = " ".join(rule["expr"] for group in groups for rule in group["rules"])
    assert set(re.findall(r"\bmlxpool_\w+", text)) - names == set()
