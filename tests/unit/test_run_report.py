"""What is made of a run folder: spans read back, the trace, and the report of one run or several."""

import json
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from async_rl.errors import RunFolderError
from async_rl.metrics.publish import step_row
from async_rl.observe import drawing, spans
from async_rl.observe.report import write_report
from async_rl.observe.trace import write_trace
from tests.support.step_records import step_record

NOW = 1_800_000_000.0
SYNC = {"total": 0.1, "pause": 0.02, "transfer": 0.08}
VOID = {"meta", "link", "br", "img", "input", "hr"}


def lines(path, values, end="\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(value) for value in values) + (end if values else ""))


def rows(count):
    return [
        {
            **step_row(step_record(step=n, time=NOW + n, elapsed_s=float(n), reward_mean=0.01 * (n % 50))),
            "sync_seconds": SYNC,
        }
        for n in range(1, count + 1)
    ]


def run_folder(path, name="try", metrics=(), events=(), config=""):
    path.mkdir()
    (path / "config.yaml").write_text(f"name: {json.dumps(name)}\ntrainer:\n  steps: 9\n{config}")
    (path / "format").write_text("1\n")
    lines(path / "metrics.jsonl", list(metrics))
    lines(path / "logs" / "pipeline.jsonl", list(events))
    return path


def call(at, seconds, trajectory, end="stop"):
    return {"what": "call", "at": NOW + at, "s": seconds, "trajectory": trajectory, "tokens": 9, "end": end}


def loop(steps):
    """A second per step: it waits, updates, pushes; one begins a little before the other ends, as two clocks tell."""
    parts = (("groups", 0.0, 0.50001), ("update", 0.5, 0.3), ("push", 0.8, 0.2))
    return [
        {"what": what, "at": NOW + step + at, "s": seconds, "step": step}
        for step in range(steps)
        for what, at, seconds in parts
    ]


def with_timeline(path, steps=8):
    """Two replicas; in each step one call of each runs through, and one is cut by the push and resumed after it."""
    lines(path / "timeline" / "pipeline.jsonl", loop(steps))
    for replica in range(2):
        found = []
        for step in range(steps):
            if step:
                found.append(call(step, 0.2, f"{replica}-{step - 1}.0/1"))
            found.append(call(step + 0.1, 0.5, f"{replica}-{step}.0/0"))
            found.append(call(step + 0.3, 0.5, f"{replica}-{step}.0/1", "abort"))
            found.append({"what": "pause", "at": NOW + step + 0.81, "s": 0.19})
        half = len(found) // 2
        lines(path / "timeline" / f"rollout-{replica}.1.jsonl", found[:half])
        lines(path / "timeline" / f"rollout-{replica}.jsonl", found[half:])
    return path


class Page(HTMLParser):
    """Fails on tags that are not balanced; keeps what tests ask for."""

    def __init__(self, source):
        super().__init__()
        self.open, self.tags, self.attributes, self.said = [], [], [], []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.said.append(data)

    @property
    def text(self):
        return "".join(self.said)


def report(*paths):
    out = paths[0].parent / "report.html"
    write_report(paths, out)
    source = out.read_text()
    page = Page(source)
    assert not re.search(
        r"https?:|//[a-z]|@import|url\(|javascript:", re.sub(r"<pre>.*?</pre>", "", source, flags=re.S)
    )
    assert not {"script", "link", "img", "iframe", "object", "embed", "use", "a", "base", "form"} & set(page.tags)
    names = {name for name, _ in page.attributes}
    assert not {"src", "href", "xlink:href", "srcset", "action"} & names
    assert not [name for name in names if name.startswith("on")]

    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes
    assert not re.search(r'"(nan|inf|-inf)|[" ,](nan|inf)[" ,]', source)
    return source, page


# -- spans ----------------------------------------------------------------------------------------------------------


def test_spans_are_read_in_order_the_older_file_first(tmp_path):
    path = with_timeline(run_folder(tmp_path / "a"))
    assert spans.roles(path) == ["pipeline", "rollout-0", "rollout-1"]
    found = list(spans.read(path, "rollout-0"))
    assert [span.end for span in found] == sorted(span.end for span in found)
    assert (found[0].role, found[0].what, found[0].at, found[0].seconds) == ("rollout-0", "call", NOW + 0.1, 0.5)
    assert found[0].fields == {"trajectory": "0-0.0/0", "tokens": 9, "end": "stop"}
    assert list(spans.read(path, "rollout-0", NOW + 6)) == [span for span in found if span.end >= NOW + 6]


def test_replicas_are_in_the_order_of_their_numbers(tmp_path):
    for role in ("rollout-10", "rollout-2", "pipeline"):
        lines(tmp_path / "timeline" / f"{role}.jsonl", [])
    lines(tmp_path / "timeline" / "rollout-3.1.jsonl", [])
    assert spans.roles(tmp_path) == ["pipeline", "rollout-2", "rollout-3", "rollout-10"]


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    path = with_timeline(run_folder(tmp_path / "a"))
    whole = list(spans.read(path, "rollout-0"))
    file = path / "timeline" / "rollout-0.jsonl"
    file.write_text(file.read_text()[:-9])
    assert list(spans.read(path, "rollout-0")) == whole[:-1]


def test_a_replacement_goes_on_in_the_line_of_one_that_was_killed(tmp_path):
    first, second = json.dumps(call(0, 1, "0-0.0/0")), json.dumps(call(2, 1, "0-0.0/0"))
    (tmp_path / "timeline").mkdir()
    (tmp_path / "timeline" / "rollout-0.jsonl").write_text(f"{first}\n{first[:30]}{second}\n")
    assert [span.at for span in spans.read(tmp_path, "rollout-0")] == [NOW, NOW + 2]


@pytest.mark.parametrize(
    "bad",
    [
        "[]",
        "{",
        '{"what": "call"}',
        '{"what": "call", "at": null, "s": 1}',
        '{"what": "call", "at": 1, "s": -1}',
        '{"what": 1}',
        "\0",
    ],
)
def test_damage_in_the_middle_is_named(tmp_path, bad):
    (tmp_path / "timeline").mkdir()
    (tmp_path / "timeline" / "pipeline.jsonl").write_text(f"{bad}\n{json.dumps(loop(1)[0])}\n")
    with pytest.raises(RunFolderError, match=r"pipeline.jsonl:1"):
        list(spans.read(tmp_path, "pipeline"))


def test_spans_of_a_window_are_those_with_a_part_in_it():
    found = [spans.Span("pipeline", str(at), at, 1.0) for at in (3.0, 0.0, 1.5, 2.0, 5.0)]
    assert [span.at for span in spans.overlapping(found, 1.0, 3.0)] == [1.5, 2.0]


def test_the_life_of_a_trajectory_goes_over_replicas():
    def one(role, at, end):
        return spans.Span(role, "call", at, 1.0, {"trajectory": "t", "end": end})

    calls = [one("rollout-1", 2.0, "stop"), one("rollout-0", 0.0, "abort"), one("rollout-0", 5.0, "abort")]
    life = spans.lives([*calls, spans.Span("rollout-0", "pause", 1.0, 1.0)])["t"]
    assert [call.at for call in life] == [0.0, 2.0, 5.0]
    assert [(cut.role, resumed.role) for cut, resumed in spans.resumptions(life)] == [("rollout-0", "rollout-1")]


def test_the_window_has_a_push_and_a_resumed_trajectory():
    pipeline = [
        spans.Span("pipeline", line["what"], line["at"], line["s"], {"step": line["step"]}) for line in loop(20)
    ]
    cut = spans.Span("rollout-0", "call", NOW + 7.1, 0.7, {"trajectory": "t", "end": "abort"})
    resumed = spans.Span("rollout-0", "call", NOW + 8.1, 0.7, {"trajectory": "t", "end": "stop"})
    begin, end = spans.window(pipeline, [cut, resumed], [(cut, resumed)])
    assert begin <= cut.end < resumed.at < end
    assert end - begin == pytest.approx(4.0)
    assert spans.window(pipeline, [], []) == (NOW + 16, pytest.approx(NOW + 20))
    later = [spans.Span(one.role, one.what, one.at + 8, one.seconds, one.fields) for one in (cut, resumed)]
    without = [span for span in pipeline if span.what != "push" or span.step < 10]
    begin, end = spans.window(without, [], [(cut, resumed), tuple(later)])
    assert end < later[0].end, "no weights were pushed then"
    again = [spans.Span("pipeline", s.what, s.at + 100, s.seconds, s.fields) for s in pipeline[30:]]
    assert spans.window(pipeline + again, [], [])[0] == NOW + 116, "steps made again count as they were made again"


# -- the trace ------------------------------------------------------------------------------------------------------


def test_the_trace_is_valid_and_its_lanes_do_not_overlap(tmp_path):
    path = with_timeline(run_folder(tmp_path / "a"))
    write_trace(path, tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    named = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert list(processes.values()) == ["pipeline", "rollout-0", "rollout-1"]
    lanes = {}
    for event in events:
        assert event["ph"] in "XMsf"
        assert all(isinstance(event[key], int) for key in ("pid", "tid", "ts"))
        if event["ph"] == "X":
            assert (event["pid"], event["tid"]) in named
            assert event["dur"] >= 0
            lanes.setdefault((event["pid"], event["tid"]), []).append(event)
    assert sum(map(len, lanes.values())) == 24 + 2 * 31
    for lane in lanes.values():
        lane.sort(key=lambda event: event["ts"])
        assert all(a["ts"] + a["dur"] <= b["ts"] for a, b in pairwise(lane))
        assert len({event["cat"] == "pause" for event in lane}) == 1, "pauses have a lane of their own"
    assert len([pid for pid, _ in lanes if processes[pid] == "pipeline"]) == 1
    assert len([pid for pid, _ in lanes if processes[pid] == "rollout-0"]) == 1 + 2, "no more lanes than it takes"
    names = {e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert names == {"training loop", "pauses", "calls 1", "calls 2"}


def test_flows_pair_up_and_tie_a_cut_call_to_the_one_that_resumed_it(tmp_path):
    path = with_timeline(run_folder(tmp_path / "a"))
    write_trace(path, tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    calls = [e for e in events if e["ph"] == "X" and e["cat"] == "call"]
    flows = [{e["id"]: e for e in events if e["ph"] == kind} for kind in "sf"]
    assert flows[0].keys() == flows[1].keys()
    assert len(flows[0]) == 2 * 7, "of two replicas; the calls cut in the last step were not resumed"
    for number, begin in flows[0].items():
        ends = []
        for flow in (begin, flows[1][number]):
            lane = [e for e in calls if (e["pid"], e["tid"]) == (flow["pid"], flow["tid"])]
            (found,) = [e for e in lane if e["ts"] <= flow["ts"] < e["ts"] + e["dur"]]
            ends.append(found)
        assert ends[0]["name"] == ends[1]["name"]
        assert [e["args"]["end"] for e in ends] == ["abort", "stop"]


def test_the_next_turn_of_a_trajectory_is_not_its_resumption(tmp_path):
    lines(tmp_path / "timeline" / "rollout-0.jsonl", [call(0, 1, "t"), call(2, 1, "t", "abort"), call(1, 3, "u")])
    write_trace(tmp_path, tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [e["ph"] for e in events if e["ph"] != "M"] == ["X", "X", "X"]


def test_a_trace_without_spans_is_refused_and_leaves_nothing(tmp_path):
    path = run_folder(tmp_path / "a")
    with pytest.raises(RunFolderError, match="timeline_bytes"):
        write_trace(path, tmp_path / "trace.json")
    lines(path / "timeline" / "pipeline.jsonl", [{"what": "push"}, *loop(1)])
    with pytest.raises(RunFolderError, match="damaged"):
        write_trace(path, tmp_path / "trace.json")
    with pytest.raises(RunFolderError, match="no run folder"):
        write_trace(tmp_path / "b", tmp_path / "trace.json")
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


# -- the report -----------------------------------------------------------------------------------------------------


def test_the_report_of_a_run(tmp_path):
    events = [
        {"event": "rollout died and is started again", "level": "info", "timestamp": "2026-11-21T10:00:00Z"},
        {"event": "process_died", "process": "trainer", "level": "info", "timestamp": "2026-11-21T10:01:00Z"},
        {"event": "worker_restarted", "replica": "rollout-0", "level": "info", "timestamp": "2026-11-21T10:02:00Z"},
    ]
    path = with_timeline(run_folder(tmp_path / "a", metrics=rows(30), events=events))
    groups = {"issued": 10, "trained": 4, "outstanding": 3, "returned": 2, "failed": 1}
    summary = {"exit_reason": "finished", "wall_s": 60.0, "eval": {"first": 0.1, "last": 0.7}, "groups": groups}
    (path / "summary.json").write_text(json.dumps(summary))
    source, page = report(path)
    for said in (
        "finished",
        "30 of 9",
        "0.100 → 0.700",
        "10 issued = 4 trained + 3 outstanding + 2 returned + 1 failed",
    ):
        assert said in page.text
    summary["groups"] |= {"issued": 15, "filtered": 5}  # which runs of earlier releases do not have
    (path / "summary.json").write_text(json.dumps(summary))
    said = "15 issued = 4 trained + 3 outstanding + 2 returned + 1 failed + 5 filtered"
    assert said in report(path)[1].text
    assert "2026-11-21 10:00:00 UTC" in page.text
    assert source.count('class="loud"') == 2, "of an earlier version and of this one"
    assert "trainer died and is being restarted" in page.text
    assert "rollout-0 was restarted" in page.text
    assert source.count("<figure") == 25
    assert page.text.count("No step has a value.") == 1, "there was no canary"
    assert "steps: 9" in source.partition("<pre>")[2]


def test_the_timeline_shows_the_cut_trajectory_and_where_it_went_on(tmp_path):
    source, _ = report(with_timeline(run_folder(tmp_path / "a", metrics=rows(3))))
    figure = source.partition("Who did what")[2].partition("</figure>")[0]
    drawing = figure.partition('role="img"')[2]
    assert "0-6.0/1" in drawing
    assert "1-6.0/1" in drawing
    assert drawing.count('class="bar cut') == 2 * 4
    ties = re.findall(r'class="tie" d="M([\d.]+) ([\d.]+)C.*? ([\d.]+) ([\d.]+)"', drawing)
    assert len(ties) == 2 * 3
    assert all(float(x1) < float(x2) and y1 == y2 for x1, y1, x2, y2 in ties)
    assert drawing.count('class="push"') == 4
    assert "0-1.0/1" not in drawing, "that was before the window"


def test_rows_of_a_replica_are_bounded_and_cut_ones_come_first(tmp_path):
    path = run_folder(tmp_path / "a", metrics=rows(3))
    lines(path / "timeline" / "pipeline.jsonl", loop(4))
    others = [call(0.1, 0.2 + n / 1000, f"other-{n}") for n in range(300)]
    life = [call(1.1, 0.7, "chosen", "abort"), call(2.1, 0.5, "chosen")]
    lines(path / "timeline" / "rollout-0.jsonl", [*others, *life])
    source, _ = report(path)
    assert "40 of 301 trajectories" in source
    assert len(set(re.findall(r"other-\d+", source))) == 39
    assert source.count('class="tie" d="M') == 1 + 1, "it, and the legend"


HOSTILE = "</title></pre><script>alert(1)</script><img src=x onerror=alert(2)>\"'&\u0000\ud800"


def test_what_a_run_folder_says_is_escaped(tmp_path):
    events = [{"event": HOSTILE, "level": HOSTILE, "timestamp": HOSTILE, HOSTILE: HOSTILE}]
    row = rows(1)[0] | {
        "sync_seconds": {"total": 1, HOSTILE: 0.5},
        "token_staleness": {HOSTILE: 3, "0": 1, "9" * 5000: 1},
    }
    path = run_folder(tmp_path / "a", name="</h1><script>", metrics=[row], events=events, config=f"# {HOSTILE[:-2]}\n")
    (path / "summary.json").write_text(json.dumps({"exit_reason": HOSTILE, "groups": HOSTILE, "wall_s": HOSTILE}))
    spans_ = [{"what": HOSTILE, "at": NOW, "s": 1, "step": 1}, {"what": "push", "at": NOW + 1, "s": 1, "step": HOSTILE}]
    lines(path / "timeline" / f"{'<b>'}.jsonl", [call(0, 1, HOSTILE, HOSTILE)])
    lines(path / "timeline" / "pipeline.jsonl", spans_)
    lines(path / "samples.jsonl", [{"step": HOSTILE, "prompt": "asked", "response": HOSTILE}])
    source, page = report(path)
    assert "<script" not in source
    assert "asked" in page.text.partition("What was sampled")[2]
    assert "<b>.jsonl" not in source
    assert page.text.count("<script>alert(1)</script>") >= 4
    assert "</h1><script>" in page.text
    write_trace(path, tmp_path / "trace.json")
    json.loads((tmp_path / "trace.json").read_text())


def test_values_that_are_missing_or_of_another_kind_are_left_out(tmp_path):
    kinds = (None, "text", [], {}, True, float("nan"), 10**400, {"0": None}, {"x": 1, "1": "y"})
    odd = [dict.fromkeys(rows(1)[0], value) for value in kinds]
    path = run_folder(tmp_path / "a", metrics=[*odd, {}, {"step": 3}])
    (path / "summary.json").write_text("[1]")
    _, page = report(path)
    assert page.text.count("No step has a value.") >= 15


def test_a_run_without_a_step(tmp_path):
    _, page = report(run_folder(tmp_path / "a"))
    for said in (
        "No training step has ended yet",
        "No spans were recorded",
        "has logged nothing",
        "There are no samples",
        "killed, or not over yet",
    ):
        assert said in page.text


def test_lines_that_were_cut_off(tmp_path):
    path = with_timeline(run_folder(tmp_path / "a", metrics=rows(5), events=[{"event": "one"}, {"event": "two"}]))
    for name in ("metrics.jsonl", "logs/pipeline.jsonl", "timeline/rollout-0.jsonl", "timeline/pipeline.jsonl"):
        (path / name).write_text((path / name).read_text()[:-5])
    _, page = report(path)
    assert "4 of 9" in page.text
    assert "two" not in page.text.partition("Events")[2]


def test_each_evaluation_set_has_a_curve_and_a_headline(tmp_path):
    found = [{**row, "eval_reward_mean": None, "eval_avg": {}} for row in rows(6)]
    found[0]["eval_avg"], found[5]["eval_avg"] = {"aime": 0.25, "math": 0.5}, {"aime": 0.375}
    path = run_folder(tmp_path / "a", metrics=found)
    source, page = report(path)
    assert "aime 0.250 → 0.375; math 0.500 → 0.500" in page.text
    sets = source.partition("<b>Evaluation sets</b>")[2].partition("</figure>")[0]
    assert ("aime</span>" in sets, "math</span>" in sets, sets.count("<circle")) == (True, True, 3)
    aime = {"first": {"avg": {"mean": 0.125}}, "last": {"avg": {"mean": 0.75}}}
    (path / "summary.json").write_text(json.dumps({"eval": {"first": 0.1, "last": 0.7}, "eval_sets": {"aime": aime}}))
    assert "aime 0.125 → 0.750; math 0.500 → 0.500" in report(path)[1].text


def test_two_runs_side_by_side(tmp_path):
    first = with_timeline(run_folder(tmp_path / "a", "first", rows(5)))
    second = run_folder(tmp_path / "b", "second", rows(70))
    source, page = report(first, second)
    assert "2 runs side by side" in page.text
    assert re.search(r"<th>Training steps</th><td>5 of 9</td><td>70 of 9</td>", source)
    entropy = source.partition("<b>Entropy</b>")[2].partition("</figure>")[0]
    assert "first</span>" in entropy
    assert "second</span>" in entropy
    assert entropy.count('class="line"') == 2 + 2
    assert "Who did what: first" in source
    assert page.text.count("No spans were recorded") == 1
    assert "config.yaml of second" in page.text


def test_runs_of_one_name_are_told_apart(tmp_path):
    _, page = report(run_folder(tmp_path / "a", "same", rows(2)), run_folder(tmp_path / "b", "same", rows(2)))
    assert str(tmp_path / "a") in page.text


def test_a_long_run_stays_small(tmp_path):
    few, row = rows(50), json.dumps
    path = run_folder(tmp_path / "a")
    with (path / "metrics.jsonl").open("w") as stream:
        stream.writelines(row(few[n % 50] | {"step": n + 1}) + "\n" for n in range(2_000))
    lines(
        path / "logs" / "pipeline.jsonl", [{"event": f"checkpoint of step {n}", "level": "info"} for n in range(5_000)]
    )
    source, page = report(path)
    assert len(source) < 1_000_000
    assert 'class="band"' in source
    assert "4,800 earlier ones are left out" in page.text


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(RunFolderError, match="no run folder"):
        write_report([tmp_path / "a"], tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


# -- figures --------------------------------------------------------------------------------------------------------


def test_bins_keep_the_extremes():
    points = [(float(n), float(n % 10)) for n in range(10_000)]
    points[5_000] = (5_000.0, 99.0)
    bins = drawing.binned(points, 100)
    assert len(bins.mean) == 100
    assert max(y for _, y in bins.high) == 99.0
    assert {y for _, y in bins.low} == {0.0}
    assert bins.mean[0] == (49.5, 4.5)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0, "0"),
        (0.25, "0.25"),
        (1234, "1.23k"),
        (1e-7, "1e-7"),
        (-2.5e-8, "-2.5e-8"),
        (999.9, "1k"),
        (3e6, "3M"),
        (0.001, "0.001"),
    ],
)
def test_numbers_are_short(value, said):
    assert drawing.short(value) == said


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (3.435, 3.445), (0.999997, 1), (5, 5), (-2e-7, 9e-6), (0, 1e6), (1e16, 1e16 + 4)]
)
def test_ticks_lie_within_the_axis_and_differ(low, high):
    ticks = drawing.Scale(low, high, 0.0, 100.0).ticks()
    assert 1 <= len(ticks) <= 8
    assert all(-1 <= drawing.Scale(low, high, 0.0, 100.0)(value) <= 101 for value, _ in ticks)
    assert len({label for _, label in ticks}) == len(ticks) or high > 1e15


def test_ticks_of_decades():
    assert [label for _, label in drawing.Scale(1e-8, 1e-4, 0.0, 1.0, log=True).ticks()] == [
        "1e-8",
        "1e-7",
        "1e-6",
        "1e-5",
        "1e-4",
    ]
    assert drawing.Scale(1e-8, 1e-4, 0.0, 1.0, log=True, pad=False)(1e-6) == pytest.approx(0.5)
