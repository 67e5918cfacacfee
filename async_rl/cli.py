"""The command line, ``async-rl VERB``: parses arguments, calls the verb, and turns errors into exit codes.

Each verb imports its modules only when it runs, so that help and --dry-run answer at once, on any machine.

Exit codes: 0 success, 1 the run failed or a check of doctor did, 2 the command line or the settings are wrong,
130 interrupted, 141 nothing reads the output any longer.
"""

from __future__ import annotations

import argparse
import itertools
import os
import select
import signal
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from async_rl import __version__
from async_rl.config.loading import default_of, leaves, load, parse_overrides, to_yaml
from async_rl.config.schema import RunConfig
from async_rl.errors import AsyncRLError, ConfigError

_FLAGS = ("-h", "--help", "--version", "--dry-run", "--once", "--cluster", "--json")
"""Options without a value; every other --word takes one."""

_OPTIONS = ("--resume", "--out", "--trace", "--port", "--checkpoint", "--cluster-spec", "--n", "--row")
"""Options with a value; every other --word is a setting."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code; other exceptions than this package's keep their traceback."""
    words, settings = split_settings(sys.argv[1:] if argv is None else argv)
    arguments = _parser().parse_args(words)
    if arguments.verb == "train":
        resume = arguments.resume is not None
        return _reported(lambda: _train(arguments.config, settings, dry_run=arguments.dry_run, resume=resume))
    if arguments.verb in ("eval", "rollout", "chat"):
        return _reported(lambda: _with_engine(arguments, settings))
    if arguments.verb == "export":
        return _reported(lambda: _export(arguments.checkpoint, arguments.out, settings))
    if arguments.verb == "dequantize":
        return _reported(lambda: _dequantize(arguments.source, arguments.out, settings))
    if arguments.verb == "doctor":
        cluster, spec = arguments.cluster, arguments.cluster_spec
        return _reported(lambda: _doctor(arguments.config, settings, of_cluster=cluster, spec=spec))
    if arguments.verb == "data":
        return _reported(lambda: _data(arguments.config, settings))
    if arguments.verb == "plan":
        return _reported(lambda: _plan(arguments.config, arguments.cluster_spec, settings))
    return _reported(lambda: _look(arguments, settings))


def _reported(verb: Callable[[], int]) -> int:
    """Return the exit code of ``verb``; print this package's errors, and a keyboard interrupt, without a traceback.

    A verb that cannot go on because nothing reads its output (``| head``) has the code of a program that SIGPIPE ends.
    """
    try:
        status = verb()
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        if not _reader_has_gone():
            raise
        return 128 + signal.SIGPIPE
    except ConfigError as error:
        sys.stderr.write(f"async-rl: {error}\n")
        return 2
    except AsyncRLError as error:
        sys.stderr.write(f"async-rl: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("async-rl: interrupted\n")
        return 130


def _reader_has_gone() -> bool:
    """Return whether nothing reads standard output; what is left to be written then goes nowhere."""
    output = sys.stdout.fileno()
    pipe = select.poll()
    pipe.register(output, 0)
    if not any(events & select.POLLERR for _, events in pipe.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return True


def split_settings(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split arguments into those for argparse and the settings (``--a.b value``, ``--a.b=value``), each in order.

    argparse cannot distinguish the value of an option that it does not know from a positional argument.
    """
    words: list[str] = []
    settings: list[str] = []
    rest = iter(argv)
    for word in rest:
        if not word.startswith("--") or word in _FLAGS:
            words.append(word)
            continue
        if word.partition("=")[0] in _OPTIONS:
            words += [word] if "=" in word else [word, *itertools.islice(rest, 1)]
            continue
        settings.append(word)
        if "=" not in word:
            settings.extend(value for value in [next(rest, None)] if value is not None)
    return words, settings


def _train(paths: Sequence[Path], settings: Sequence[str], *, dry_run: bool, resume: bool) -> int:
    config = load(paths, parse_overrides(settings))
    if dry_run:
        sys.stdout.write(to_yaml(config))
        return 0
    # Before anything heavy is imported: the supervisor forks.
    from async_rl.runtime.supervisor import supervise

    return supervise(lambda: _reported(lambda: _run(config, resume=resume)))


def _run(config: RunConfig, *, resume: bool) -> int:
    from async_rl.driver import before_ray

    before_ray.prepare()
    from async_rl.driver.run import run

    return run(config, resume=resume)


def _with_engine(arguments: argparse.Namespace, settings: Sequence[str]) -> int:
    """Run a verb that starts an engine of its own, of model.path or of a checkpoint."""
    overrides = parse_overrides(settings)
    config = load(arguments.config, overrides)
    # Before anything heavy is imported: the supervisor forks.
    from async_rl.runtime.supervisor import supervise

    checkpoint = None if arguments.checkpoint is None else _run_folder(arguments.checkpoint)
    moved = config.model.path if "model.path" in overrides else None

    def run() -> int:
        if arguments.verb == "eval":
            from async_rl.driver.eval_command import run as evaluate

            return evaluate(config, checkpoint, moved)
        if arguments.verb == "chat":
            from async_rl.driver.chat_command import run as chat

            return chat(config, checkpoint=checkpoint, moved=moved)
        from async_rl.driver.rollout_command import run as make_rollouts

        n, row, as_json = arguments.n, arguments.row, arguments.json
        return make_rollouts(config, n=n, row=row, as_json=as_json, checkpoint=checkpoint, moved=moved)

    return supervise(lambda: _reported(run))


def _export(path: Path, out: Path, settings: Sequence[str]) -> int:
    from async_rl.driver.export import export

    source = export(path, out, parse_overrides(settings))
    sys.stdout.write(f"exported {source} to the Hugging Face folder {out}\n")
    return 0


def _dequantize(source: Path, out: Path, settings: Sequence[str]) -> int:
    _refuse_settings("dequantize", settings)
    from async_rl.models.dequantize import dequantize

    plan = dequantize(source, out, report=_progress)
    sys.stdout.write(
        f"converted {plan.quantized} weights of {source} to bfloat16 and copied {plan.copied}; "
        f"set model.path to {out}\n"
    )
    return 0


def _progress(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def _doctor(paths: Sequence[Path], settings: Sequence[str], *, of_cluster: bool, spec: str | None) -> int:
    from async_rl import doctor

    config: RunConfig | None = None
    if paths:
        config = load(paths, parse_overrides(settings))
    elif of_cluster:
        raise ConfigError("--cluster: hosts are checked for a run; write async-rl doctor CONFIG --cluster")
    elif settings:
        raise ConfigError(f"{settings[0]}: settings need a config file; write async-rl doctor CONFIG {settings[0]} ...")
    if spec is not None:
        if config is None or of_cluster:
            raise ConfigError("--cluster-spec: write async-rl doctor CONFIG --cluster-spec SPEC, without --cluster")
        from async_rl.doctor import described
        from async_rl.doctor.memory_plan import ClusterSpec

        found = described.checks(config, ClusterSpec.parse(spec))
        sys.stdout.write(doctor.report(found, "cluster"))
        return 1 if doctor.failed(found) else 0
    if config is not None and of_cluster:
        from async_rl.driver.hosts import examine

        text, can_start = examine(config)
        sys.stdout.write(text)
        return 0 if can_start else 1
    found = doctor.checks(config)
    sys.stdout.write(doctor.report(found))
    if config is not None and config.cluster.joined_address is not None:
        sys.stdout.write("the hosts of its cluster are checked by async-rl doctor CONFIG --cluster\n")
    return 1 if doctor.failed(found) else 0


def _data(paths: Sequence[Path], settings: Sequence[str]) -> int:
    from async_rl.data.preview import preview

    text, usable = preview(load(paths, parse_overrides(settings)))
    sys.stdout.write(text)
    return 0 if usable else 1


def _plan(paths: Sequence[Path], spec: str, settings: Sequence[str]) -> int:
    from async_rl.doctor.memory_plan import ClusterSpec, plan_memory

    text, fits = plan_memory(load(paths, parse_overrides(settings)), ClusterSpec.parse(spec))
    sys.stdout.write(text)
    return 0 if fits else 1


def _look(arguments: argparse.Namespace, settings: Sequence[str]) -> int:
    """Run a verb that reads run folders; these verbs take no settings."""
    _refuse_settings(arguments.verb, settings)
    if arguments.verb == "watch":
        from async_rl.observe.watch import watch

        return watch(_run_folder(arguments.run), once=arguments.once)
    if arguments.verb == "report":
        return _report([_run_folder(run) for run in arguments.run], arguments.out, arguments.trace)
    from async_rl.observe import serve

    if arguments.verb == "replay-metrics":
        return serve.replay(_run_folder(arguments.run), port=arguments.port)
    return serve.observe(arguments.runs, port=arguments.port)


def _refuse_settings(verb: str, settings: Sequence[str]) -> None:
    if settings:
        raise ConfigError(f"async-rl {verb} has no option {settings[0]}; see async-rl {verb} --help")


def _report(runs: Sequence[Path], out: Path, trace: Path | None) -> int:
    from async_rl.observe.report import write_report
    from async_rl.observe.trace import write_trace

    if trace is not None and len(runs) > 1:
        raise ConfigError(f"--trace: a trace shows one run, but {len(runs)} are given; name one run")
    write_report(runs, out)
    sys.stdout.write(f"{out}: open it in any browser\n")
    if trace is not None:
        write_trace(runs[0], trace)
        sys.stdout.write(f"{trace}: open it in Perfetto (https://ui.perfetto.dev) or chrome://tracing\n")
    return 0


def _run_folder(run: Path) -> Path:
    """Return the run folder; a run may be named without the runs/ that contains it."""
    below = Path("runs") / run
    return below if not run.exists() and below.is_dir() else run


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="async-rl",
        description="Fully asynchronous RL post-training of mixture-of-experts language models.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"async-rl {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    train = verbs.add_parser(
        "train",
        help="train a model as a config file describes",
        usage="async-rl train CONFIG [CONFIG ...] [--dry-run] [--resume auto] [--section.key value ...]",
        description="Train a model as CONFIG describes. Of several files, each overrides those before it, and settings "
        "on the command line override all of them.",
        epilog=_settings_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    train.add_argument("config", type=Path, nargs="+", metavar="CONFIG", help="YAML file with settings from below")
    train.add_argument("--dry-run", action="store_true", help="print the resolved settings and exit")
    train.add_argument(
        "--resume",
        choices=["auto"],
        help="resume this run from its latest valid checkpoint, or start it if it has none",
    )

    evaluate = verbs.add_parser(
        "eval",
        help="evaluate a checkpoint on the sets of a config file",
        usage="async-rl eval CONFIG [CONFIG ...] [--checkpoint FOLDER] [--section.key value ...]",
        description="Evaluate a checkpoint on data.eval and eval.sets of CONFIG with one engine, without a trainer. "
        "Prints a table, and as the last line the results as JSON; they are also written to <runs>/<name>-eval.",
        allow_abbrev=False,
    )
    rollout = verbs.add_parser(
        "rollout",
        help="make a few rollouts and print each as it went",
        usage="async-rl rollout CONFIG [CONFIG ...] [--n N] [--row ROW] [--json] [--checkpoint FOLDER] "
        "[--section.key value ...]",
        description="Make rollouts as the run of CONFIG would, with its agent, environment and rewards, with one "
        "engine and without a trainer, and print each: turns, tools, forks, tokens, reward. Exits with 1 if one fails.",
        allow_abbrev=False,
    )
    rollout.add_argument("--n", type=int, default=4, metavar="N", help="how many rollouts; 4 by default")
    rollout.add_argument(
        "--row", metavar="ROW", help="number of the row that all are of; by default one of each of the first N rows"
    )
    rollout.add_argument("--json", action="store_true", help="print each as one line of JSON")
    chat = verbs.add_parser(
        "chat",
        help="talk to the model in the terminal, or over HTTP",
        usage="async-rl chat CONFIG [CONFIG ...] [--checkpoint FOLDER] [--section.key value ...]",
        description="Start one engine and the agents' gateway, print the address and key that a client of OpenAI's "
        "API takes, and answer each line of the standard input, until it ends.",
        allow_abbrev=False,
    )
    for verb in (evaluate, rollout, chat):
        verb.add_argument("config", type=Path, nargs="+", metavar="CONFIG", help="YAML file as for train")
        verb.add_argument(
            "--checkpoint",
            type=Path,
            metavar="FOLDER",
            help="Hugging Face folder, run folder or its name (its final model, or else its latest checkpoint), or "
            "step-... folder; model.path by default",
        )

    export = verbs.add_parser(
        "export",
        help="convert a checkpoint of the trainer to a Hugging Face folder",
        usage="async-rl export CHECKPOINT OUT [--section.key value ...]",
        description="Write the model of CHECKPOINT to OUT as a Hugging Face folder. CHECKPOINT is a step-... "
        "folder, or a run folder for its latest valid checkpoint. Settings on the command line override the run's.",
        allow_abbrev=False,
    )
    export.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="checkpoint or run folder")
    export.add_argument("out", type=Path, metavar="OUT", help="folder to write; must be empty or not exist")

    convert = verbs.add_parser(
        "dequantize",
        help="convert a checkpoint in block-wise fp8 to bfloat16",
        usage="async-rl dequantize SOURCE OUT",
        description="Write the Hugging Face folder SOURCE, whose weights are in block-wise fp8 like DeepSeek-V3's, to "
        "OUT in bfloat16, in which they are trained. Needs no GPU, and memory for a file of 5 GB and one of SOURCE.",
        allow_abbrev=False,
    )
    convert.add_argument("source", type=Path, metavar="SOURCE", help="folder whose config.json has quantization_config")
    convert.add_argument("out", type=Path, metavar="OUT", help="folder to write; must be empty or not exist")

    doctor = verbs.add_parser(
        "doctor",
        help="check whether a run can start on this machine",
        usage="async-rl doctor [CONFIG ...] [--cluster | --cluster-spec SPEC] [--section.key value ...]",
        description="Check this machine, its packages and the inputs for the run that CONFIG describes; without "
        "CONFIG, only machine and packages. Exits with 1 if a run could not start.",
        allow_abbrev=False,
    )
    doctor.add_argument("config", type=Path, nargs="*", metavar="CONFIG", help="YAML file as for train")
    doctor.add_argument(
        "--cluster",
        action="store_true",
        help="check every host of the Ray cluster at cluster.address, or RAY_ADDRESS, against what the run needs",
    )
    doctor.add_argument(
        "--cluster-spec",
        metavar="SPEC",
        help="check against GPUs that this machine need not have: hosts, GPUs of each, name and GB, as 4x8xH100-80",
    )
    data = verbs.add_parser(
        "data",
        help="show what a run would read: prompts, tokens, bad rows",
        usage="async-rl data CONFIG [CONFIG ...] [--section.key value ...]",
        description="Show the datasets of CONFIG: the first rows as text and tokens, a histogram of lengths, bad rows "
        "by reason. Reads every row. Exits with 1 if a run would not take them.",
        allow_abbrev=False,
    )
    data.add_argument("config", type=Path, nargs="+", metavar="CONFIG", help="YAML file as for train")
    plan = verbs.add_parser(
        "plan",
        help="compute whether a run fits into GPUs that this machine need not have",
        usage="async-rl plan memory CONFIG [CONFIG ...] --cluster-spec HOSTSxGPUSxNAME-GB [--section.key value ...]",
        description="Compute from CONFIG and the checkpoint's config.json what a trainer rank and an engine take of a "
        "GPU, and what to set where they do not fit. Exits with 1 if they do not.",
        allow_abbrev=False,
    )
    plan.add_argument("what", choices=["memory"], help="what to compute")
    plan.add_argument("config", type=Path, nargs="+", metavar="CONFIG", help="YAML file as for train")
    plan.add_argument(
        "--cluster-spec", required=True, metavar="SPEC", help="hosts, GPUs of each, their name and GB: 4x8xH100-80"
    )
    _add_looking(verbs)
    return parser


def _add_looking(verbs: Any) -> None:
    run_help = "run folder, or its name below runs/"
    watch = verbs.add_parser(
        "watch",
        help="show a run live in the terminal",
        description="Show the run RUN live in the terminal: over ssh, or from another machine that sees its folder.",
        allow_abbrev=False,
    )
    watch.add_argument("run", type=Path, metavar="RUN", help=run_help)
    watch.add_argument("--once", action="store_true", help="show the current state once, and exit")

    report = verbs.add_parser(
        "report",
        help="write a report of a run to one HTML file",
        description="Write a report of RUN, or of several runs side by side, to one HTML file that needs no network.",
        allow_abbrev=False,
    )
    report.add_argument("run", type=Path, nargs="+", metavar="RUN", help=run_help)
    report.add_argument("--out", type=Path, default=Path("report.html"), metavar="FILE", help="report.html by default")
    report.add_argument(
        "--trace", type=Path, metavar="FILE", help="also write the run's timeline, for Perfetto or Chrome"
    )

    observe = verbs.add_parser(
        "observe",
        help="start Prometheus and Grafana for all runs",
        description="Start Prometheus, and Grafana if it is installed, for all present and future runs in RUNS. "
        "Ctrl-C stops them.",
        allow_abbrev=False,
    )
    observe.add_argument("runs", type=Path, nargs="?", default=Path("runs"), metavar="RUNS", help="runs by default")

    replay = verbs.add_parser(
        "replay-metrics",
        help="show a finished run in Prometheus and Grafana",
        description="Load the metrics.jsonl of RUN into a Prometheus of its own, as if it had been observed live.",
        allow_abbrev=False,
    )
    replay.add_argument("run", type=Path, metavar="RUN", help=run_help)
    for verb in (observe, replay):
        verb.add_argument(
            "--port", type=int, default=9090, metavar="PORT", help="9090 by default, or the next free one"
        )


def _settings_help() -> str:
    lines = ["settings:"]
    for key, sentence in leaves():
        lines.append(f"  --{key}  [{default_of(key)}]")
        lines.extend(textwrap.wrap(sentence, width=100, initial_indent=" " * 6, subsequent_indent=" " * 6))
    return "\n".join(lines).replace("%", "%%")


if __name__ == "__main__":
    sys.exit(main())
