"""``async-rl observe`` and ``replay-metrics``: Prometheus, and Grafana where it is installed, with everything in place.

Knows the programs, and the package's ``assets``, which have the alerts, the dashboard and Grafana's provisioning.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode

import yaml

from async_rl.metrics.spec import PREFIX
from async_rl.observe import prometheus
from async_rl.observe.backfill import backfill
from async_rl.observe.prometheus import ASSETS

_RULES = ASSETS / "prometheus" / "rules.yml"
_GRAFANA_PORT = 3000
_DATA = ".observe"
# The curves on Prometheus' own page.
_CURVES = (
    f"{PREFIX}ppo_kl",
    f"{PREFIX}reward_mean",
    f'{{__name__=~"{PREFIX}(rollout|trainer)_idle_ratio"}}',
)


def observe(runs: Path, *, port: int = prometheus.PORT) -> int:
    """Watch every run below ``runs``, later ones included, until Ctrl-C.

    Samples are kept in ``runs``/.observe. Raises ResourceError where Prometheus is missing.
    """
    prometheus.program()  # before anything is made
    with prometheus.running(runs / _DATA / "prometheus", runs=runs, rules=_RULES, port=port) as url:
        _tell(port, url, f"watching the runs in {runs.absolute()}")
        sys.stdout.write(f"ppo_kl, reward and who waits, without Grafana: {_graph(url)}\n")
        sys.stdout.flush()
        with _grafana(runs / _DATA / "grafana", url):
            _until_interrupted()
    return 0


def replay(run: Path, *, port: int = prometheus.PORT) -> int:
    """Show the metrics.jsonl of a run that has ended in a Prometheus of its own, until Ctrl-C.

    Raises RunFolderError, and ResourceError where Prometheus is missing.
    """
    prometheus.program()
    with tempfile.TemporaryDirectory(prefix="async_rl-replay-") as name:
        data = backfill(run, Path(name) / "prometheus")
        with prometheus.running(data, port=port) as url:
            _tell(port, url, f"{run} as it was")
            with _grafana(Path(name) / "grafana", url):
                _until_interrupted()
    return 0


def _tell(port: int, url: str, what: str) -> None:
    if not url.endswith(f":{port}"):
        sys.stdout.write(f"port {port} is in use; this Prometheus is on the next free one\n")
    sys.stdout.write(f"Prometheus: {url}  ({what}; alerts: {url}/alerts)\n")
    sys.stdout.flush()


@contextlib.contextmanager
def _grafana(data: Path, url: str) -> Iterator[None]:
    """Run a Grafana with datasource and dashboards in place; where it is not installed, print how to get one."""
    path = shutil.which("grafana") or shutil.which("grafana-server")
    if path is None:
        sys.stdout.write(
            "Grafana is not installed: grafana.com has packages; or\n"
            f"docker compose -f {ASSETS / 'compose.yaml'} up starts both. Ctrl-C ends.\n"
        )
        sys.stdout.flush()
        yield
        return
    port = prometheus.free_port(_GRAFANA_PORT)
    home = _provision(data, url)
    environment = {
        "GF_PATHS_DATA": str(home / "data"),
        "GF_PATHS_LOGS": str(home / "logs"),
        "GF_PATHS_PROVISIONING": str(home / "provisioning"),
        "GF_SERVER_HTTP_ADDR": "127.0.0.1",
        "GF_SERVER_HTTP_PORT": str(port),
        # Every user of this machine may look: the port is on the loopback interface.
        "GF_AUTH_ANONYMOUS_ENABLED": "true",
        "GF_AUTH_ANONYMOUS_ORG_ROLE": "Viewer",
        "GF_ANALYTICS_REPORTING_ENABLED": "false",
        "GF_ANALYTICS_CHECK_FOR_UPDATES": "false",
    }
    command = [path, "server"] if Path(path).name == "grafana" else [path]
    # Packages keep Grafana's own files here; an installation from an archive finds them next to the program.
    homepath = Path("/usr/share/grafana")
    command += ["--homepath", str(homepath)] if homepath.is_dir() else []
    log = home / "grafana.log"
    with prometheus.program_running(command, log, environment):
        sys.stdout.write(f"Grafana:    http://127.0.0.1:{port}/d/async-rl  (log: {log}). Ctrl-C ends.\n")
        sys.stdout.flush()
        yield


def _graph(url: str) -> str:
    """Return the address of Prometheus' own page with some curves of the last quarter of an hour."""
    panels = {
        f"g{number}.{key}": value
        for number, expression in enumerate(_CURVES)
        for key, value in (("expr", expression), ("tab", "0"), ("range_input", "15m"))
    }
    return f"{url}/graph?{urlencode(panels)}"


def _provision(data: Path, url: str) -> Path:
    """Write Grafana's folder, with the datasource at ``url`` and the package's dashboard. Returns it."""
    home = data.absolute()
    sources = yaml.safe_load((ASSETS / "provisioning" / "datasources" / "prometheus.yaml").read_text())
    for source in sources["datasources"]:
        source["url"] = url
    provider = {"name": "async_rl", "type": "file", "options": {"path": str(ASSETS / "grafana")}}
    for folder, tree in (
        ("datasources", sources),
        ("dashboards", {"apiVersion": 1, "providers": [provider]}),
    ):
        path = home / "provisioning" / folder / "async_rl.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(tree))
    for folder in ("data", "logs"):
        (home / folder).mkdir(exist_ok=True)
    return home


def _until_interrupted() -> None:
    """Wait for Ctrl-C. The handlers stay, as a second Ctrl-C must not interrupt the end of the programs."""
    # The interpreter itself writes to the pipe as soon as a signal comes. Were it a handler that writes, a signal just
    # before the read would be handled only after it, and the read would wait for ever.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    os.read(reader, 1)
