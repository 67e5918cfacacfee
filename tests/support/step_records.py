"""A plausible step, for tests that only care about one of its fields."""

from dataclasses import fields

from async_rl.metrics.evaluation import Answered, EvalRules, estimate, eval_line
from async_rl.metrics.records import StepRecord, StepReport, TokenAgreement

_REPORT = {field.name for field in fields(StepReport)} - {"groups", "trajectories"}


def step_report(**changes) -> StepReport:
    """100 trained tokens, 60 of staleness 0 and 40 of staleness 2."""
    values = {
        "loss": 0.1,
        "grad_norm": 1.5,
        "lr": 1e-4,
        "skipped": {},
        "version": 0,
        "groups": 2,
        "trajectories": 4,
        "tokens_masked": {},
        "agreement": TokenAgreement(tokens=100, kl=0.004, abs_mean=0.01, abs_max=0.3),
        "agreement_by_staleness": {
            0: TokenAgreement(tokens=60, kl=1e-8, abs_mean=1e-7, abs_max=2e-6),
            2: TokenAgreement(tokens=40, kl=0.01, abs_mean=0.025, abs_max=0.3),
        },
        "agreement_by_resume_position": {
            "uninterrupted": TokenAgreement(tokens=70, kl=1e-3, abs_mean=0.002, abs_max=0.01),
            "before": TokenAgreement(tokens=30, kl=0.011, abs_mean=0.03, abs_max=0.3),
        },
        "agreement_by_engine": {"vllm": TokenAgreement(tokens=100, kl=0.004, abs_mean=0.01, abs_max=0.3)},
        "ppo_kl_k3": 0.002,
        "extreme_token_fraction": 0.01,
        "clip_fraction": 0.05,
        "entropy": 0.9,
        "effective_sample_size_ratio": 0.97,
        "router_fallback_rows": 0,
        "extra_positions": 0,
        "microbatches": 1,
        "temperature": (1.001, 0.02),
        "router_disagreement": 0.04,
    }
    return StepReport(**values | changes)


def step_record(**changes) -> StepRecord:
    """Four trajectories of two groups, two of them partial. changes: fields of the record or of its report."""
    values = {
        "step": 1,
        "policy_version": 0,
        "time": 1_800_000_000.0,
        "elapsed_s": 2.0,
        "report": step_report(**{name: value for name, value in changes.items() if name in _REPORT}),
        "reward_mean": 0.4,
        "groups": 2,
        "response_tokens": (10, 20, 30, 40),
        "segments": (1, 1, 2, 3),
        "interruptions": (0, 0, 1, 2),
        "rollout_ends": {"done": 2, "truncated": 1},
        "rollout_branches": (1, 2, 1),
        "rollout_turns": (1, 5, 3),
        "prefix_recomputed_share": 0.125,
        "queue_groups": 6,
        "queue_bytes": 3_000_000,
        "groups_outstanding": 24,
        "rollout_idle_ratio": 0.1,
        "trainer_idle_ratio": 0.25,
        "overlap_efficiency": 0.9,
        "step_s": 2.0,
    }
    return StepRecord(**values | {name: value for name, value in changes.items() if name not in _REPORT})


def eval_results(reward, name="held_out", problems=2):
    """Results of an evaluation set of this mean reward, the same on each problem, of which every fourth passes."""
    answered = [Answered((reward,) * 4, (30,) * 4, truncated=1)] * problems
    return {**eval_line(name, answered, EvalRules(4, (1, 4), 1.0)), "pass": {"1": estimate([0.25])}}
