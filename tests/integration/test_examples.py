"""Each example of docs/examples runs: two training steps for real, on the tiny random model."""

import os
import subprocess

import pytest
import yaml

from async_rl.config.loading import load
from tests.support.needs import ENVIRONMENTS_PYTHON, NEEDS_ENVIRONMENTS
from tests.support.real_run import ROOT, Run

EXAMPLES = sorted(path.parent for path in (ROOT / "docs" / "examples").glob("*/config.yaml"))
# Has a library in an environment of its own, and writes its own rows.
FOREIGN = ROOT / "docs" / "examples" / "word_sorting"
TRAINED = [pytest.param(path, marks=NEEDS_ENVIRONMENTS if path == FOREIGN else ()) for path in EXAMPLES]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_a_config_a_readme_and_code(example):
    assert load(example / "config.yaml", {}).name == example.name
    assert f"docs/examples/{example.name}/config.yaml" in (example / "README.md").read_text()
    assert list(example.glob("*.py"))


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize("example", TRAINED, ids=[path.name for path in EXAMPLES])
def test_an_example_trains(example, recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(example))
    tiny = yaml.safe_load(recipe.read_text())
    config = load(example / "config.yaml", {})
    evaluated = config.data.eval is not None
    train, own = tiny["data"]["train"], {"data__max_prompt_tokens": tiny["data"]["max_prompt_tokens"]}
    for name in config.eval.sets:
        own |= {f"eval__sets__{name}__path": tiny["data"]["eval"], f"eval__sets__{name}__limit": 4}
    if example == FOREIGN:
        train, own = tmp_path / "train.jsonl", {"rollout__agent__python": ENVIRONMENTS_PYTHON}
        command = [ENVIRONMENTS_PYTHON, example / "words.py", train]
        subprocess.run(command, check=True, timeout=300, env=os.environ | {"PYTHONPATH": str(ROOT)})
    run = Run(
        example / "config.yaml",
        tmp_path,
        name="run",
        prepare="null",
        model__path=tiny["model"]["path"],
        data__train=train,
        data__eval=tiny["data"]["eval"] if evaluated else "null",
        trainer__steps=2,
        trainer__groups_per_step=2,
        rollout__n=2,
        rollout__max_num_seqs=8,
        eval__n=4,
        **own,
    )
    try:
        assert run.wait() == 0, run.output
        assert run.summary["exit_reason"] == "finished"
        assert len(run.rows) == 2
    finally:
        run.close()
