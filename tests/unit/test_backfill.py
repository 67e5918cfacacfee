"""A run that nobody watched, in Prometheus: the same series as if it had been scraped."""

import re
import subprocess

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as strictly
from prometheus_client.parser import text_string_to_metric_families

from async_rl.config.loading import validate
from async_rl.errors import ResourceError, RunFolderError
from async_rl.metrics import publish
from async_rl.metrics.exporter import Metrics
from async_rl.metrics.records import SyncRecord
from async_rl.observe import history, prometheus
from async_rl.observe.backfill import backfill, openmetrics
from async_rl.runtime.runfolder import RunFolder
from tests.support.prometheus_api import ask
from tests.support.step_records import step_record

BEGAN = 1_800_000_000.0


def record(step, **changes):
    sync = SyncRecord(policy_version=step, seconds=0.3, phases={"pause": 0.1, "transfer": 0.2}, canary=1e-7)
    given = {"tokens_masked": {"stale": 3, "not_sampled": 0}, "skipped": {"non_finite": 1}}
    given |= {"router_fallback_rows": 2, "extra_positions": 5, "replica_versions": {0: step, 1: step - 1}}
    given |= {"step": step, "policy_version": step, "time": BEGAN + step, "reward_mean": step / 10, "last_sync": sync}
    return step_record(**given | changes)


def write(tmp_path, rows):
    tree = {"name": "demo", "runs": str(tmp_path), "model": {"path": "m"}, "data": {"train": "t"}}
    with RunFolder(validate(tree)) as folder:
        for row in rows:
            folder.write_step(row)
    return folder.path


def series(path):
    """{(name, labels but for those of the target): [(time, value)]} of the pipeline."""
    found = {}
    for family in text_string_to_metric_families("".join(openmetrics(history.read(path)))):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("run") == "demo"
            if (labels.pop("role"), labels.pop("replica")) == ("pipeline", "0"):
                key = (sample.name, *sorted(labels.items()))
                found.setdefault(key, []).append(
                    (round(sample.timestamp * 1000, 3), sample.value)
                )  # that parser's unit is ms
    return found


def test_the_last_samples_are_what_a_scrape_would_have_said(tmp_path):
    """Against the exporter itself: it gets the same steps, live."""
    records = [record(step) for step in (1, 2, 3)]
    found = series(write(tmp_path, [publish.step_row(one) for one in records]))
    with Metrics("pipeline") as metrics:
        publish.publish_start(metrics)
        for one in records:
            publish.publish_sync(metrics, one.last_sync)
            publish.publish_step(metrics, one)
        live = {
            (sample.name, *sorted(sample.labels.items())): sample.value
            for family in metrics.registry.collect()
            for sample in family.samples
            if sample.name.startswith("async_rl_")
        }
    # Of these a row has a summary only, or nothing.
    unsaid = (
        "async_rl_segments_per_trajectory",
        "async_rl_trajectories_per_rollout",
        "async_rl_turns_per_rollout",
        "async_rl_response_tokens",
        "async_rl_sync_retries",
        "async_rl_sync_canary_un",
        "async_rl_groups_dropped",
        "async_rl_groups_failed",
        "async_rl_process_restarts",
        "async_rl_checkpoints",
        "async_rl_rollout_replicas_lost",
    )
    missing = [key for key in live if key not in found and not key[0].startswith(unsaid)]
    assert missing == []
    made_up = [key for key in found if key not in live and key[0] != "async_rl_groups_trained_total"]
    assert made_up == []
    for key in live.keys() & found.keys():
        assert found[key][-1][1] == pytest.approx(live[key]), key


def test_samples_have_the_times_of_their_steps_and_counters_never_fall(tmp_path):
    rows = [
        publish.step_row(record(1)),
        publish.step_row(record(2, time=BEGAN + 1)),
        publish.step_row(record(3))
        | {"tokens_masked": None, "entropy": None, "token_staleness": {"0": None}, "replica_versions": {"0": None}},
    ]
    found = series(write(tmp_path, rows))
    assert found[("async_rl_reward_mean",)] == [(BEGAN + 1, 0.1), (BEGAN + 1.001, 0.2), (BEGAN + 3, 0.3)]
    assert [value for _, value in found[("async_rl_entropy",)]] == [0.9, 0.9]
    assert [value for _, value in found["async_rl_tokens_masked_total", ("reason", "stale")]] == [0, 3, 6]
    for (name, *_), samples in found.items():
        if name.endswith(("_total", "_count", "_bucket")):
            values = [value for _, value in samples]
            assert values == sorted(values), name


def test_two_steps_never_share_a_millisecond(tmp_path):
    # Halves of a millisecond are what rounds either way.
    times = [BEGAN + step * 0.7123 + after for step in range(1, 50) for after in (0.0005, 0.0006, 0.0015)]
    path = write(tmp_path, [publish.step_row(record(step, time=time)) for step, time in enumerate(times, 1)])
    shown = [time for time, _ in series(path)[("async_rl_reward_mean",)]]
    assert len(set(shown)) == len(times)
    assert shown == sorted(shown)
    assert max(abs(one - other) for one, other in zip(shown, times, strict=True)) < 0.003


def test_counters_of_known_reasons_begin_at_0_when_the_run_does(tmp_path):
    rows = [publish.step_row(record(1, time=BEGAN + 9, elapsed_s=9.0, tokens_masked={"stale": 3}, skipped={}))]
    found = series(write(tmp_path, rows))
    assert found["async_rl_tokens_masked_total", ("reason", "stale")] == [(BEGAN, 0), (BEGAN + 9, 3)]
    assert found["async_rl_updates_skipped_total", ("reason", "non_finite")] == [(BEGAN, 0)]


def test_a_push_counts_once_however_many_steps_come_after_it(tmp_path):
    sync = SyncRecord(policy_version=1, seconds=0.3)
    rows = [publish.step_row(record(step, policy_version=(step + 1) // 2, last_sync=sync)) for step in (1, 2, 3, 4)]
    found = series(write(tmp_path, rows))
    assert [value for _, value in found["async_rl_sync_seconds_count", ("phase", "total")]] == [1, 2]


def test_it_is_openmetrics(tmp_path):
    """By a strict parser: everything but histograms at once, and these moment by moment, since of a histogram it knows
    one moment only."""
    path = write(tmp_path, [publish.step_row(record(step)) for step in (1, 2, 3)])
    *lines, end = openmetrics(history.read(path))
    assert end == "# EOF\n"
    of_histogram = re.compile(r"[^{]*_(bucket|count|sum){|# TYPE .* histogram")
    plain = [line for line in lines if not of_histogram.match(line)]
    assert {family.type for family in strictly("".join([*plain, end]))} == {"counter", "gauge"}
    for step in (1, 2, 3):
        moment = [line for line in lines if line[0] == "#" or float(line.split()[-1]) == BEGAN + step]
        families = {family.name: family for family in strictly("".join([*moment, end]))}
        assert {family.type for family in families.values()} == {"counter", "gauge", "histogram"}
        (reward,) = families["async_rl_reward_mean"].samples
        assert (reward.value, float(reward.timestamp)) == (step / 10, BEGAN + step)
        counts = [s.value for s in families["async_rl_step_seconds"].samples if s.name.endswith("_count")]
        assert counts == [step]


def test_promtool_makes_blocks_of_it(tmp_path):
    path = write(tmp_path, [publish.step_row(record(step)) for step in (1, 2, 3)])
    data = backfill(path, tmp_path / "data")
    assert [entry.name for entry in data.iterdir() if not (entry / "meta.json").exists()] == []
    (data / "wal").mkdir()  # dump asks for it
    dump = subprocess.run(["promtool", "tsdb", "dump", data], capture_output=True, text=True, check=True).stdout
    found = re.findall(
        r'^{__name__="async_rl_reward_mean", replica="0", role="pipeline", run="demo"} (.*)$', dump, re.M
    )
    assert found == [f"{step / 10} {int(BEGAN + step) * 1000}" for step in (1, 2, 3)]


def test_prometheus_shows_it(tmp_path):
    path = write(tmp_path, [publish.step_row(record(step)) for step in range(1, 200)])
    with prometheus.running(backfill(path, tmp_path / "data"), port=19190) as url:

        def query(expression):
            (result,) = ask(url, "query", query=expression, time=BEGAN + 199)["result"]
            return float(result["value"][1])

        assert query('async_rl_reward_mean{run="demo"}') == 19.9
        assert query("increase(async_rl_training_steps_total[100s])") == pytest.approx(100, abs=1)
        assert query('async_rl_policy_version{role="rollout",replica="1"}') == 198


def test_what_cannot_be_shown_is_said(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    with pytest.raises(RunFolderError, match="has no training step yet"):
        backfill(write(tmp_path / "a", []), tmp_path / "data")
    (tmp_path / "b").mkdir()
    row = publish.step_row(record(1))
    del row["time"]
    with pytest.raises(RunFolderError, match="step 1 has no time"):
        backfill(write(tmp_path / "b", [row]), tmp_path / "data")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ResourceError, match="promtool is not installed: apt install prometheus"):
        backfill(tmp_path / "b" / "demo", tmp_path / "data")


def test_hostile_names_do_not_break_the_text(tmp_path):
    rows = [publish.step_row(record(1, tokens_masked={'a"b\\c\nd': 1}))]
    assert ("async_rl_tokens_masked_total", ("reason", 'a"b\\c\nd')) in series(write(tmp_path, rows))
