"""``async-rl eval``: evaluates a checkpoint on the sets of a config, with one engine in this process and no trainer.

Owns what surrounds the evaluation: which model it is of, the folder of its results, and how they are printed. The
answers are those of ``rollout.evaluation``, the results those of ``driver.evaluation``. Starts no Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from async_rl.config.functions import load_function
from async_rl.config.schema import RunConfig
from async_rl.data import reading
from async_rl.data.chat import CheckpointEncoder
from async_rl.driver.evaluation import EvalSet
from async_rl.driver.export import FINAL, find
from async_rl.driver.run import read_eval_sets, resolved
from async_rl.driver.samples import readable_answer
from async_rl.errors import CheckpointError, ConfigError, EngineError
from async_rl.metrics.evaluation import EvalLine
from async_rl.models.config import check_not_quantized
from async_rl.rollout.agents import Agents
from async_rl.rollout.calls import EngineCalls
from async_rl.rollout.engine.interface import RolloutEngine
from async_rl.rollout.engine.loader import load_engine
from async_rl.rollout.environments.turns import load_environments
from async_rl.rollout.evaluation import EvalAnswer, EvalResult, evaluate
from async_rl.rollout.gate import Gate
from async_rl.rollout.responses import Responses
from async_rl.rollout.rewards.runner import RewardRunner
from async_rl.rollout.stats import WorkerStats, worker_id
from async_rl.runtime import logs
from async_rl.runtime.interrupt import Interrupted, until_interrupted
from async_rl.runtime.process import mark_semaphores
from async_rl.runtime.runfolder import RunFolder, to_json


@dataclass(frozen=True, slots=True)
class Source:
    """What ``--checkpoint`` names."""

    path: Path
    exported: bool
    """Whether ``path`` is a Hugging Face folder; else it is a checkpoint of a trainer."""


def run(config: RunConfig, checkpoint: Path | None, moved: Path | None = None) -> int:
    """Evaluate ``checkpoint``, None for model.path, and print the results. Returns the exit code.

    moved: the folder of the model that the checkpoint's run began with, if it is elsewhere by now. Raises AsyncRLError.
    """
    if not config.eval_sets:
        raise ConfigError("there is nothing to evaluate on: set data.eval, or eval.sets.NAME.path for a set of a name")
    if config.prepare is not None:
        load_function("prepare", config.prepare, ("config",), ConfigError)(config)
    source = Source(config.model.path, exported=True) if checkpoint is None else find_source(checkpoint)
    if source.exported:
        check_not_quantized(source.path)
    config = alone(config, source)
    encoder = reading.encoder(config)
    sets = read_eval_sets(config, encoder, {})
    with RunFolder(config) as folder:
        logs.configure(config.run_dir, "eval", console=True)
        mark_semaphores(worker_id(0))
        responses = sum(each.rules.k * len(each.problems) for each in sets)
        sys.stderr.write(f"evaluating {source.path}: {', '.join(each.name for each in sets)}, {responses} responses\n")
        try:
            with exported(source, config.run_dir, moved) as model:
                result = _answers(with_model(config, model), sets, encoder)
        except (Interrupted, KeyboardInterrupt):
            return 130
        lines = _record(config, folder, source, sets, result, encoder)
        summary = {"checkpoint": str(source.path), "folder": str(config.run_dir), "sets": lines}
        folder.write_summary(summary)
    sys.stdout.write(f"{table(lines)}{to_json(summary)}\n")
    return 0


def find_source(path: Path) -> Source:
    """Return the Hugging Face folder that ``path`` is or that its run has exported, else its latest checkpoint.

    Raises CheckpointError when there is neither.
    """
    for folder in (path, path / FINAL, path / "checkpoints" / FINAL):
        if (folder / "config.json").is_file():
            return Source(folder.absolute(), exported=True)
    try:
        return Source(find(path).absolute(), exported=False)
    except CheckpointError as error:
        raise CheckpointError(f"--checkpoint {path} is no Hugging Face folder with a config.json: {error}") from None


def alone(config: RunConfig, source: Source) -> RunConfig:
    """Return the config of an evaluation: its folder is beside the run's, and the engine only answers.

    Raises ConfigError for an engine that this host cannot have alone.
    """
    if (hosts := config.rollout.hosts_per_engine) > 1:
        raise ConfigError(
            f"rollout.hosts_per_engine is {hosts}, but this command's engine is on this host; set it to 1 and "
            "rollout.tensor_parallel_size to GPUs of this host, or evaluate in the run (eval.every)"
        )
    changed = config.model_copy(
        update={
            "name": f"{config.name}-eval",
            "rollout": config.rollout.model_copy(update={"return_routed_experts": False}),
            "metrics": config.metrics.model_copy(update={"engine": False}),
        }
    )
    return resolved(with_model(changed, source.path) if source.exported else changed, resume=False)


def with_model(config: RunConfig, model: Path) -> RunConfig:
    """Return the config with another model."""
    return config.model_copy(update={"model": config.model.model_copy(update={"path": model})})


@contextlib.contextmanager
def exported(source: Source, folder: Path, moved: Path | None) -> Iterator[Path]:
    """Yield the Hugging Face folder of ``source``, made below ``folder`` and removed at the end if there is none."""
    if source.exported:
        yield source.path
        return
    with tempfile.TemporaryDirectory(prefix="model-", dir=folder) as made:
        # In a process of its own, whose memory is free again before the engine starts.
        command = [sys.executable, "-m", "async_rl.cli", "export", str(source.path), made]
        command += [] if moved is None else ["--model.path", str(moved)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = (done.stderr.strip() or "it said nothing").splitlines()[-1].removeprefix("async-rl: ")
            raise CheckpointError(f"{source.path} cannot be exported, exit code {done.returncode}: {said}")
        yield Path(made)


def _answers(config: RunConfig, sets: Sequence[EvalSet], encoder: CheckpointEncoder) -> EvalResult:
    """Return the answers to the problems of all sets. Raises Interrupted, RewardError and EngineError."""
    found: list[EvalResult] = []

    async def work() -> None:
        engine = load_engine(config.rollout.engine_of(0))(config, 0, cores=None)
        found.append(await answers(config, sets, engine, encoder.tokenizer))

    asyncio.run(until_interrupted(work()))
    return found[0]


async def answers(config: RunConfig, sets: Sequence[EvalSet], engine: RolloutEngine, tokenizer: Any) -> EvalResult:
    """Start ``engine``, have it answer the problems of all sets, and end it."""
    environments = load_environments(config, tokenizer)
    responses = Responses(config, engine, tokenizer, RewardRunner(config.reward), environments)
    gate = Gate()
    agents = Agents(config, responses, EngineCalls(engine, gate, responses, WorkerStats(0)), gate, tokenizer)
    try:
        await engine.start()
        problems = [problem for each in sets for problem in each.problems]
        return await evaluate(problems, engine, responses, agents, at_once=config.rollout.evaluated_at_once)
    except EngineError as error:
        raise EngineError(f"{error} (logs: {config.run_dir / 'logs'})") from error
    finally:
        responses.close()
        await agents.close()
        await engine.shutdown()


def _record(
    config: RunConfig,
    folder: RunFolder,
    source: Source,
    sets: Sequence[EvalSet],
    result: EvalResult,
    encoder: CheckpointEncoder,
) -> dict[str, EvalLine]:
    """Write down the results and the responses to be read; return the results by set. Raises RewardError."""
    lines: dict[str, EvalLine] = {}
    for each in sets:
        own = [answer for answer in result.answers if answer.set == each.name]
        lines[each.name] = {"checkpoint": str(source.path), "time": time.time(), **each.results(own)}
        folder.write_eval(lines[each.name])
        for sample in _samples(config, each, own, encoder):
            folder.write_eval_sample({"checkpoint": str(source.path), **sample})
    return lines


def _samples(
    config: RunConfig, each: EvalSet, own: Sequence[EvalAnswer], encoder: CheckpointEncoder
) -> Iterator[Mapping[str, Any]]:
    prompts = {problem.prompt.prompt_id: problem.prompt for problem in each.problems}
    for answer in own:
        if (shown := answer.shown) is not None:
            most, decode = config.metrics.sample_characters, encoder.tokenizer.decode
            yield readable_answer(prompts[answer.prompt_id], each.name, shown, decode, most)


def table(lines: Mapping[str, EvalLine]) -> str:
    """Return the results as text: a row for each set, and for each source in it, and the metrics of agents."""
    rows = [("set", "problems", "k", "avg@k", "pass@k", "cut off", "tokens")]
    for name, line in lines.items():
        failed = f" ({line['failed']} failed)" if line["failed"] else ""
        rows.append((name, f"{line['problems']}{failed}", str(line["k"]), *_cells(line)))
        for source, part in line.get("sources", {}).items():
            rows.append((f"  {source}", str(part["problems"]), str(line["k"]), *_cells(part)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    text = "".join(f"{row.rstrip()}\n" for row in aligned)
    for name, line in lines.items():
        if metrics := line.get("metrics"):
            text += f"{name}: {', '.join(f'{key} {value:.4g}' for key, value in metrics.items())}\n"
    return text


def _cells(line: EvalLine) -> tuple[str, str, str, str]:
    """Return what a row says of results; behind ± is half of the 95 % interval."""
    passes = "  ".join(f"@{k} {_with_error(each)}" for k, each in line["pass"].items())
    return _with_error(line["avg"]), passes, f"{line['truncated']:.1%}", f"{line['response_tokens_mean']:.0f}"


def _with_error(estimate: Mapping[str, float | None]) -> str:
    mean, high = estimate["mean"], estimate["high"]
    assert mean is not None
    return f"{mean:.3f}" + ("" if high is None else f" ± {high - mean:.3f}")
