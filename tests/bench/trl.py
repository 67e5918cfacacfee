"""Seconds of training until a greedy evaluation reaches a goal: this package and TRL's ``GRPOTrainer``, in turns.

Both have the same model, data, reward, learning rate and batch (8 prompts with 8 responses), as configs/tiny_moe.yaml
says, and the same cores. Set-up and evaluations do not count. Between two evaluations the reward
is taken to rise in a straight line.

Printed last, one JSON line: seconds_over_trl, ours over TRL's; seconds and the evaluations by step of each.

    .venv/bin/pip install -e '.[bench]'      # not in `make bench`, which installs nothing
    .venv/bin/python -m tests.bench.trl [--goal 0.60] [--steps 80] [--every 10] [--rounds 1]
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from async_rl.config.loading import load
from async_rl.config.schema import RunConfig
from async_rl.metrics.timeline import TIMELINE
from async_rl.rollout.rewards.text import partial_credit
from async_rl.types import Prompt
from tests.bench.runs import ROOT, train

CONFIG = ROOT / "configs" / "tiny_moe.yaml"
# (step, seconds of training until then, mean reward)
Curve = list[tuple[int, float, float]]


def ours(config: RunConfig, steps: int, every: int, seed: int, folder: Path) -> Curve:
    """Train with the recipe as it stands."""
    settings = {"seed": seed, "trainer.steps": steps, "eval.every": every, "eval.n": config.eval.n}
    settings["eval.beside_rollouts"] = "false"  # its time is left out, so that it must be apart
    run = train(CONFIG, folder, f"ours-{seed}", settings)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    spans = [json.loads(line) for line in (run / TIMELINE / "pipeline.jsonl").read_text().splitlines()]
    began = rows[0]["time"] - rows[0]["elapsed_s"]
    evaluations = [span for span in spans if span["what"] == "evaluation" and span["at"] > began]
    rewards = [row["eval_reward_mean"] for row in rows if row["eval_reward_mean"] is not None]
    last = json.loads((run / "summary.json").read_text())["eval"]["last"]
    curve, paused = [], 0.0
    for span, reward in zip(evaluations, [*rewards, last], strict=False):
        curve.append((span["step"], span["at"] - began - paused, reward))
        paused += span["s"]
    return curve


def theirs(config: RunConfig, steps: int, every: int, seed: int) -> Curve:
    """Train with TRL in this process."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    problems, optimizer = rows_of(config.data.eval)[: config.eval.n], config.trainer.optimizer

    def reward(prompts: list[str], completions: list[str], answer: list[str], **_: object) -> list[float]:
        return [scored(*each) for each in zip(prompts, completions, answer, strict=True)]

    class Evaluations(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.curve: Curve = []
            self.began, self.paused = 0.0, 0.0

        def on_train_begin(self, *_: object, **__: object) -> None:
            self.began = time.monotonic()

        def on_step_end(self, _: object, state: object, *__: object, **___: object) -> None:
            step, now = state.global_step, time.monotonic()  # type: ignore[attr-defined]
            if step % every == 0:
                mean = greedy_mean(model, tokenizer, problems, config.rollout.max_response_tokens)
                self.curve.append((step, now - self.began - self.paused, mean))
                self.paused += time.monotonic() - now
                print(f"TRL, step {step}: {self.curve[-1]}", file=sys.stderr, flush=True)

    evaluations = Evaluations()
    with tempfile.TemporaryDirectory() as folder:
        batch = config.trainer.groups_per_step * config.rollout.n
        GRPOTrainer(
            model=model,
            processing_class=tokenizer,
            reward_funcs=reward,
            train_dataset=Dataset.from_list(rows_of(config.data.train)),
            callbacks=[evaluations],
            args=GRPOConfig(
                output_dir=folder,
                use_cpu=True,
                bf16=False,
                seed=seed,
                max_steps=steps,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=1,
                num_generations=config.rollout.n,
                max_completion_length=config.rollout.max_response_tokens,
                temperature=config.rollout.temperature,
                top_k=0,
                beta=0.0,
                learning_rate=optimizer.lr,
                warmup_steps=optimizer.warmup_steps,
                lr_scheduler_type="constant_with_warmup",
                weight_decay=optimizer.weight_decay,
                adam_beta1=optimizer.beta1,
                adam_beta2=optimizer.beta2,
                max_grad_norm=optimizer.clip_grad,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                gradient_checkpointing=False,
                logging_steps=10**9,
            ),
        ).train()
    return evaluations.curve


def rows_of(path: Path | None) -> list[dict[str, str]]:
    assert path is not None
    return [json.loads(line) for line in path.read_text().splitlines()]


def scored(prompt: str, response: str, answer: str) -> float:
    return partial_credit(
        Prompt(prompt_id="0-0", row=0, text=prompt, token_ids=np.zeros(1, np.int32), fields={"answer": answer}),
        response,
    )


def greedy_mean(model, tokenizer, problems: list[dict[str, str]], max_new_tokens: int) -> float:  # type: ignore[no-untyped-def]
    """Return the mean reward of greedy responses."""
    import torch

    rewards = []
    with torch.inference_mode():
        for first in range(0, len(problems), 64):
            part = problems[first : first + 64]
            asked = tokenizer([row["prompt"] for row in part], return_tensors="pt", padding=True, padding_side="left")
            asked.pop("token_type_ids", None)
            answered = model.generate(**asked, do_sample=False, max_new_tokens=max_new_tokens)
            texts = tokenizer.batch_decode(answered[:, asked["input_ids"].shape[1] :], skip_special_tokens=True)
            rewards += [scored(row["prompt"], text, row["answer"]) for row, text in zip(part, texts, strict=True)]
    return statistics.mean(rewards)


def seconds_to(goal: float, curve: Curve) -> float | None:
    """Return the seconds of training until the goal; None if it was not reached."""
    for (_, before_s, before), (_, after_s, after) in itertools.pairwise(curve):
        if before < goal <= after:
            return before_s + (after_s - before_s) * (goal - before) / (after - before)
    return curve[0][1] if curve and curve[0][2] >= goal else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--goal", type=float, default=0.60)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--every", type=int, default=10, help="steps between evaluations")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only-trl", type=int, metavar="SEED", help="used by this command itself")
    arguments = parser.parse_args()
    config = load(CONFIG)
    if arguments.only_trl is not None:
        print(json.dumps(theirs(config, arguments.steps, arguments.every, arguments.only_trl)))
        return
    size = ["--steps", str(arguments.steps), "--every", str(arguments.every)]
    curves: dict[str, list[Curve]] = {"ours": [], "trl": []}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(arguments.rounds):
            curves["ours"].append(ours(config, arguments.steps, arguments.every, seed, Path(folder)))
            command = [sys.executable, "-m", "tests.bench.trl", "--only-trl", str(seed), *size]
            child = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
            curves["trl"].append(json.loads(child.stdout.splitlines()[-1]))
    seconds = {who: [seconds_to(arguments.goal, curve) for curve in found] for who, found in curves.items()}
    reached = {who: [each for each in found if each is not None] for who, found in seconds.items()}
    ratio = statistics.median(reached["ours"]) / statistics.median(reached["trl"]) if all(reached.values()) else None
    print(json.dumps({"seconds_over_trl": ratio, "goal": arguments.goal, "seconds": seconds, "evaluations": curves}))


if __name__ == "__main__":
    main()
