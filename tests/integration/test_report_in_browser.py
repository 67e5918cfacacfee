"""The report as a reader gets it: opened by a real browser, which has nothing to complain about, and shows figures."""

import json
import shutil
import subprocess

import matplotlib.image
import numpy as np
import pytest

from async_rl.config.loading import validate
from async_rl.metrics.publish import step_row
from async_rl.observe.report import write_report
from async_rl.runtime.runfolder import RunFolder
from tests.support.step_records import step_record

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    top = tmp_path_factory.mktemp("report")
    tree = {"name": "demo", "runs": str(top), "model": {"path": "m"}, "data": {"train": "t"}}
    config = validate(tree | {"trainer": {"steps": 50}})
    with RunFolder(config) as folder:
        for step in range(1, 51):
            folder.write_step(step_row(step_record(step=step, time=1.8e9 + step, reward_mean=step / 50)))
        timeline = folder.path / "timeline"
        timeline.mkdir()
        spans = [{"what": "push", "at": 1.8e9 + step, "s": 0.2, "step": step} for step in range(45, 51)]
        (timeline / "pipeline.jsonl").write_text("".join(json.dumps(span) + "\n" for span in spans))
        calls = [
            {"what": "call", "at": 1.8e9 + 46.2, "s": 0.8, "trajectory": "0-1.0/0", "tokens": 9, "end": "abort"},
            {"what": "call", "at": 1.8e9 + 47.2, "s": 0.5, "trajectory": "0-1.0/0", "tokens": 5, "end": "stop"},
        ]
        (timeline / "rollout-0.jsonl").write_text("".join(json.dumps(call) + "\n" for call in calls))
        write_report([folder.path], top / "report.html")
    return top / "report.html"


def browse(page, picture):
    assert shutil.which("chromium"), "chromium is not installed: apt install chromium"
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
    ]
    command += ["--window-size=1200,5000", "--enable-logging=stderr", f"--screenshot={picture}"]
    command += [f"--user-data-dir={picture.parent / 'profile'}", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stderr


def complaints(log):
    return [line for line in log.splitlines() if "CONSOLE" in line]


def test_the_browser_has_nothing_to_complain_about_and_shows_figures(report, tmp_path):
    assert complaints(browse(report, tmp_path / "report.png")) == []
    pixels = matplotlib.image.imread(tmp_path / "report.png")[:, :, :3]
    shades = np.unique((pixels.reshape(-1, 3) * 255).astype(np.uint8), axis=0)
    assert len(shades) > 100, "the page is all but empty"


def test_a_complaint_would_be_seen(report, tmp_path):
    """The page forbids scripts, so one that was smuggled in is refused aloud."""
    (tmp_path / "page.html").write_text(report.read_text().replace("<main>", "<main><script>1</script>"))
    assert complaints(browse(tmp_path / "page.html", tmp_path / "page.png")) != []
