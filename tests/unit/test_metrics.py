"""Declarations keep to Prometheus' conventions; the exporter takes only what is declared and serves it for
real.
"""

import json
import re
import socket
import threading
import time
import urllib.request

import pytest
import structlog.testing
from prometheus_client import REGISTRY, Counter, enable_created_metrics, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from async_rl.config.loading import validate
from async_rl.errors import ResourceError
from async_rl.metrics import exporter, publish
from async_rl.metrics.declared import METRICS
from async_rl.metrics.exporter import MAX_SERIES, Metrics, UndeclaredMetric
from async_rl.metrics.records import GroupCounts, SyncRecord
from async_rl.metrics.spec import PREFIX, series_key
from tests.support.step_records import step_record

# The contract with dashboards: these names stay.
CONTRACT = [
    "policy_version",
    "reward_mean",
    "ppo_kl",
    "ppo_kl_k3",
    "rollout_logprob_abs_diff_mean",
    "rollout_logprob_abs_diff_max",
    "extreme_token_fraction",
    "clip_fraction",
    "entropy",
    "grad_norm",
    "effective_sample_size_ratio",
    "token_staleness",
    "tokens_masked_total",
    "groups_dropped_total",
    "partial_rollouts_total",
    "segments_per_trajectory",
    "resumed_prefill_tokens_total",
    "queue_groups",
    "queue_bytes",
    "groups_outstanding",
    "rollout_idle_ratio",
    "trainer_idle_ratio",
    "overlap_efficiency",
    "sync_seconds",
    "sync_canary_logprob_abs_diff",
    "generated_tokens_total",
    "trained_tokens_total",
    "router_fallback_rows_total",
    "watchdog_stalled_seconds",
]


@pytest.fixture
def metrics():
    with Metrics("pipeline", run="r") as metrics:
        yield metrics


def scrape(port: int) -> dict[str, float]:
    """Every sample of a real scrape, by series."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as response:
        return parse(response.read().decode())


def exposed(metrics: Metrics) -> dict[str, float]:
    """What a scrape would give, without the server (which takes half a second to close)."""
    return parse(generate_latest(metrics.registry).decode())


def parse(text: str) -> dict[str, float]:
    return {
        series_key(sample.name, sample.labels): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_the_contract_is_declared():
    assert [name for name in CONTRACT if name not in METRICS] == []


@pytest.mark.parametrize("spec", METRICS.values(), ids=lambda spec: spec.name)
def test_declarations_follow_the_conventions(spec):
    assert re.fullmatch(r"[a-z][a-z0-9_]*", spec.name)
    assert spec.full_name == PREFIX + spec.name
    assert spec.help.endswith(".")
    assert spec.how_to_read
    assert (spec.kind == "counter") == spec.name.endswith("_total")
    assert (spec.kind == "histogram") == bool(spec.buckets)
    assert list(spec.buckets) == sorted(set(spec.buckets))
    assert not spec.values or (spec.kind == "counter" and len(spec.labels) == 1)
    assert not spec.whole or (spec.kind == "gauge" and spec.labels)
    if spec.unit in ("seconds", "bytes"):
        assert spec.unit in spec.name


@pytest.mark.parametrize(
    "emit",
    [
        lambda m: m.set("no_such_metric", 1),
        lambda m: m.set("groups_issued_total", 1),
        lambda m: m.inc("policy_version"),
        lambda m: m.observe("policy_version", 1),
        lambda m: m.observe_each("policy_version", (1,)),
        lambda m: m.set("policy_version", 1, replica=0),
        lambda m: m.inc("tokens_masked_total", 1),
        lambda m: m.inc("tokens_masked_total", 1, cause="stale"),
        lambda m: m.set("extreme_token_fraction", 0.1),
        lambda m: m.set_all("policy_version", 1, {}),
        lambda m: m.set_all("extreme_token_fraction", 0.1, {2: 0.1}),
    ],
)
def test_undeclared_names_kinds_and_labels_are_errors(metrics, emit):
    with pytest.raises(UndeclaredMetric):
        emit(metrics)


@pytest.mark.parametrize("amount", [-1, float("nan")])
def test_counters_never_fall(metrics, amount):
    with pytest.raises(ValueError, match="counter"):
        metrics.inc("generated_tokens_total", amount)


def test_exposition_gives_what_was_emitted(metrics):
    metrics.set("policy_version", 3)
    metrics.inc("tokens_masked_total", 2, reason="stale")
    metrics.inc("tokens_masked_total", 3, reason="stale")
    metrics.count_to("groups_issued_total", 17)
    metrics.set_all("ppo_kl", 0.5, {0: 1e-8, 2: 0.25})
    samples = exposed(metrics)
    assert samples["async_rl_policy_version"] == 3
    assert samples['async_rl_tokens_masked_total{reason="stale"}'] == 5
    assert samples["async_rl_groups_issued_total"] == 17
    assert samples["async_rl_ppo_kl"] == 0.5
    assert samples['async_rl_ppo_kl{staleness="0"}'] == 1e-8
    assert samples['async_rl_ppo_kl{staleness="2"}'] == 0.25
    assert samples["process_resident_memory_bytes"] > 0


def test_histogram_buckets_are_cumulative_and_weighted(metrics):
    metrics.observe("token_staleness", 0, count=5)
    metrics.observe("token_staleness", 1, count=2)
    metrics.observe("token_staleness", 100)
    samples = exposed(metrics)
    assert samples['async_rl_token_staleness_bucket{le="0.0"}'] == 5
    assert samples['async_rl_token_staleness_bucket{le="1.0"}'] == 7
    assert samples['async_rl_token_staleness_bucket{le="16.0"}'] == 7
    assert samples['async_rl_token_staleness_bucket{le="+Inf"}'] == 8
    assert samples["async_rl_token_staleness_count"] == 8
    assert samples["async_rl_token_staleness_sum"] == 102


def test_many_observations_at_once_are_as_many_one_by_one(metrics):
    values = [0, 8, 9, 250, 40_000, 250]
    with Metrics("pipeline") as other:
        for value in values:
            other.observe("response_tokens", value)
        metrics.observe_each("response_tokens", values[:2])
        metrics.observe_each("response_tokens", values[2:])
        metrics.observe_each("segments_per_trajectory", ())
        ours, one_by_one = (
            {name: value for name, value in exposed(each).items() if name.startswith("async_rl_")}
            for each in (metrics, other)
        )
    assert ours == one_by_one
    assert ours["async_rl_response_tokens_count"] == 6


def test_a_label_value_that_no_longer_occurs_vanishes(metrics):
    metrics.set_all("ppo_kl", 0.1, {0: 0.0, 1: 0.1})
    metrics.set_all("ppo_kl", 0.0, {0: 0.0})
    assert 'async_rl_ppo_kl{staleness="1"}' not in exposed(metrics)


def test_hostile_label_values_survive_the_trip(metrics):
    metrics.inc("groups_failed_total", reason='line\nbreak "quoted" \\')
    (key,) = [key for key in exposed(metrics) if key.startswith("async_rl_groups_failed_total")]
    assert key == 'async_rl_groups_failed_total{reason="line\nbreak "quoted" \\"}'


def test_counting_from_many_threads_loses_nothing(metrics):
    def count():
        for _ in range(2000):
            metrics.inc("generated_tokens_total")
            metrics.observe("response_tokens", 10)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    samples = exposed(metrics)
    assert samples["async_rl_generated_tokens_total"] == 8000
    assert samples["async_rl_response_tokens_count"] == 8000


def test_publishing_a_run_emits_only_declared_metrics(metrics):
    """publish raises if a record's field has no declaration; the scrape has what the step said."""
    publish.publish_step(metrics, step_record(eval_reward_mean=0.5, tokens_masked={"stale": 4}))
    record = SyncRecord(
        policy_version=2, seconds=0.5, phases={"pause": 0.1}, canary=1e-7, unreached_experts=3, retries={"canary": 1}
    )
    publish.publish_sync(metrics, record)
    publish.publish_groups(metrics, GroupCounts(issued=5, trained=3, outstanding=2))
    samples = exposed(metrics)
    assert samples["async_rl_reward_mean"] == 0.4
    assert samples["async_rl_eval_reward_mean"] == 0.5
    assert samples["async_rl_policy_version"] == 2
    assert samples['async_rl_ppo_kl{staleness="0"}'] == 1e-8
    assert samples['async_rl_extreme_token_fraction{tau="2"}'] == 0.01
    assert samples['async_rl_tokens_masked_total{reason="stale"}'] == 4
    assert samples["async_rl_trained_tokens_total"] == 100
    assert samples['async_rl_ppo_kl_by_resume_position{position="before"}'] == 0.011
    assert samples['async_rl_rollout_logprob_abs_diff_max_by_resume_position{position="before"}'] == 0.3
    assert samples["async_rl_partial_rollouts_total"] == 2
    assert samples["async_rl_segments_per_trajectory_count"] == 4
    assert samples['async_rl_sync_seconds_sum{phase="pause"}'] == 0.1
    assert samples["async_rl_groups_outstanding"] == 2
    assert samples["async_rl_sync_canary_unreached_experts"] == 3
    assert samples['async_rl_sync_retries_total{reason="canary"}'] == 1
    assert samples["async_rl_router_disagreement_ratio"] == 0.04
    assert samples["async_rl_rollout_temperature_ratio"] == 1.001
    assert samples["async_rl_rollout_temperature_explained_ratio"] == 0.02


def test_positions_that_exact_computes_again_are_counted(metrics):
    for _ in range(2):
        publish.publish_step(metrics, step_record(extra_positions=12))
    assert exposed(metrics)["async_rl_exact_extra_tokens_total"] == 24


def test_a_resume_position_that_no_longer_occurs_vanishes(metrics):
    publish.publish_step(metrics, step_record())
    publish.publish_step(metrics, step_record(agreement_by_resume_position={}))
    assert [name for name in exposed(metrics) if "resume_position" in name] == []


def test_a_librarys_own_metrics_are_served_beside_ours(metrics):
    counter = Counter("vllm:tokens", "Of the library.", ["of"])
    try:
        counter.labels('a "b"').inc(3)
        metrics.include("vllm:")
        its_own = {series: value for series, value in exposed(metrics).items() if series.startswith("vllm:")}
        assert its_own == {'vllm:tokens_total{of="a "b""}': 3}  # and not when it was made
        # As Prometheus 2 asks: whatever it takes, it is given the text format, in which a name keeps its colon.
        takes = {"Accept": "application/openmetrics-text;version=1.0.0,text/plain;q=0.5", "Accept-Encoding": "gzip"}
        request = urllib.request.Request(f"http://127.0.0.1:{metrics.serve()}/metrics", headers=takes)
        with urllib.request.urlopen(request, timeout=5) as response:
            assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            assert r'vllm:tokens_total{of="a \"b\""} 3.0' in response.read().decode().splitlines()
    finally:
        REGISTRY.unregister(counter)
        enable_created_metrics()


def test_scrape_over_http_on_loopback_only(metrics):
    metrics.set("policy_version", 3)
    metrics.observe("sync_seconds", 0.3, phase="pause")
    samples = scrape(metrics.serve())
    assert samples["async_rl_policy_version"] == 3
    assert samples['async_rl_sync_seconds_bucket{le="0.5",phase="pause"}'] == 1
    assert metrics._server.server_address[0] == "127.0.0.1"


def test_a_port_in_use_gives_the_next_one_and_says_so(metrics):
    with socket.create_server(("127.0.0.1", 0)) as taken, structlog.testing.capture_logs() as logs:
        port = taken.getsockname()[1]
        served = metrics.serve(port=port)
        assert port < served
        assert scrape(served)
        (said,) = logs
        assert (said["port"], said["served_on"], said["log_level"]) == (port, served, "warning")


def test_ports_in_use_up_to_the_last_are_one_clear_error(metrics):
    error = pytest.raises(ResourceError, match=r"metrics\.port: .*127\.0\.0\.1:65535.*or to 0")
    with socket.create_server(("127.0.0.1", 65535)), error:
        metrics.serve(port=65535)


def test_a_label_explosion_is_bounded(metrics):
    for number in range(1000):
        metrics.inc("groups_failed_total", reason=f"id {number}")
        metrics.count_to("groups_dropped_total", 1, reason=f"id {number}")
        metrics.observe("sync_seconds", 0.1, phase=f"id {number}")
        metrics.set("extreme_token_fraction", 0.1, tau=number)
    metrics.set_all("ppo_kl", 0.1, dict.fromkeys(range(1000), 0.1))
    samples = exposed(metrics)
    failed = {key: value for key, value in samples.items() if key.startswith("async_rl_groups_failed_total")}
    assert sum(failed.values()) == 1000
    assert failed['async_rl_groups_failed_total{reason="other"}'] == 900
    for name in (
        "groups_failed_total",
        "groups_dropped_total",
        "sync_seconds_count",
        "extreme_token_fraction",
        "ppo_kl",
    ):
        assert len([key for key in samples if key.startswith(f"async_rl_{name}")]) == MAX_SERIES + 1, name


def test_counters_with_known_reasons_begin_at_zero(metrics):
    publish.publish_start(metrics)
    samples = exposed(metrics)
    assert samples['async_rl_groups_dropped_total{reason="stale"}'] == 0
    assert samples['async_rl_process_restarts_total{process="queue"}'] == 0


def test_host_of_another_machine_is_one_clear_error(metrics):
    with pytest.raises(ResourceError, match=r"metrics\.host"):
        metrics.serve(host="192.0.2.1")


def test_target_file_appears_and_vanishes(tmp_path):
    metrics = Metrics("rollout", run="demo", replica=1)
    port = metrics.serve(run_dir=tmp_path / "demo")
    path = tmp_path / "demo" / "prometheus" / "targets" / "rollout-1.json"
    beside = tmp_path / ".prometheus" / "rollout-1@demo.json"
    assert beside.read_text() == path.read_text()
    (group,) = json.loads(path.read_text())
    assert group == {
        "targets": [f"127.0.0.1:{port}"],
        "labels": {"run": "demo", "role": "rollout", "replica": "1"},
    }
    assert scrape(port)
    metrics.close()
    metrics.close()
    assert list(path.parent.iterdir()) == list(beside.parent.iterdir()) == []
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port), timeout=1)


@pytest.mark.parametrize(
    ("host", "joined", "own", "served", "target"),
    [
        (None, None, "127.0.0.1", "127.0.0.1", "127.0.0.1"),
        (None, "10.0.0.1:6379", "127.0.0.2", "127.0.0.2", "127.0.0.2"),
        ("0.0.0.0", "10.0.0.1:6379", "10.0.0.7", "0.0.0.0", "10.0.0.7"),
        ("0.0.0.0", None, "10.0.0.7", "0.0.0.0", socket.gethostname()),
        ("127.0.0.1", "10.0.0.1:6379", "10.0.0.7", "127.0.0.1", "127.0.0.1"),
        ("::", "[fd00::1]:6379", "fd00::7", "::", "[fd00::7]"),
    ],
)
def test_the_target_names_the_address_at_which_the_host_is_reached(
    tmp_path, monkeypatch, host, joined, own, served, target
):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(exporter, "address_towards", lambda peer: own if peer == joined else None)
    listened = []
    monkeypatch.setattr(Metrics, "_listen", lambda self, host, port: (listened.append(host) or FakeServer(), None))
    config = validate(
        {
            "name": "demo",
            "runs": str(tmp_path),
            "model": {"path": "m"},
            "data": {"train": "t"},
            "metrics": {"host": host},
            "cluster": {"address": joined},
        }
    )
    with exporter.serve_metrics(config, "rollout", 0, order=1):
        (group,) = json.loads((tmp_path / "demo" / "prometheus" / "targets" / "rollout.json").read_text())
    assert listened == [served]
    assert group["targets"] == [f"{target}:8000"]


class FakeServer:
    """Listens nowhere."""

    server_port = 8000

    def shutdown(self):
        pass

    def server_close(self):
        pass


def test_targets_that_others_serve_appear_and_vanish_as_well(tmp_path):
    metrics = Metrics("pipeline", run="demo")
    metrics.serve(run_dir=tmp_path / "demo")
    metrics.refer("ray", ["10.0.0.1:8080", "10.0.0.2:8081"], tmp_path / "demo")
    folders = tmp_path / "demo" / "prometheus" / "targets", tmp_path / ".prometheus"
    assert sorted(path.name for path in folders[0].iterdir()) == ["pipeline.json", "ray-1.json", "ray.json"]
    (group,) = json.loads((folders[1] / "ray-1@demo.json").read_text())
    assert group == {"targets": ["10.0.0.2:8081"], "labels": {"run": "demo", "role": "ray", "replica": "1"}}
    metrics.close()
    assert [list(folder.iterdir()) for folder in folders] == [[], []]


def test_a_call_costs_little_beside_a_token(metrics):
    """No bound on time, only a ratio: a count must stay within a small multiple of a bare locked addition."""
    lock, value, rounds = threading.Lock(), {"x": 0.0}, 20_000
    start = time.perf_counter()
    for _ in range(rounds):
        with lock:
            value["x"] += 1
    bare = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(rounds):
        metrics.inc("generated_tokens_total", 1)
    assert time.perf_counter() - start < 100 * bare
