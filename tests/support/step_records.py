"""A plausible step, for tests that only care about one of its fields."""

from async_rl.metrics.summary import StepRecord, TokenAgreement


def step_record(**changes) -> StepRecord:
    """100 trained tokens, 60 of staleness 0 and 40 of staleness 2; four trajectories, two of them partial."""
    values = {
        "step": 1,
        "policy_version": 0,
        "time": 1_800_000_000.0,
        "elapsed_s": 2.0,
        "reward_mean": 0.4,
        "loss": 0.1,
        "grad_norm": 1.5,
        "learning_rate": 1e-4,
        "entropy": 0.9,
        "clip_fraction": 0.05,
        "effective_sample_size_ratio": 0.97,
        "agreement": TokenAgreement(tokens=100, kl=0.004, abs_mean=0.01, abs_max=0.3),
        "agreement_by_staleness": {
            0: TokenAgreement(tokens=60, kl=1e-8, abs_mean=1e-7, abs_max=2e-6),
            2: TokenAgreement(tokens=40, kl=0.01, abs_mean=0.025, abs_max=0.3),
        },
        "agreement_by_resume_position": {
            "uninterrupted": TokenAgreement(tokens=70, kl=1e-3, abs_mean=0.002, abs_max=0.01),
            "before": TokenAgreement(tokens=30, kl=0.011, abs_mean=0.03, abs_max=0.3),
        },
        "ppo_kl_k3": 0.002,
        "extreme_token_fraction": 0.01,
        "temperature": (1.001, 0.02),
        "router_disagreement_ratio": 0.04,
        "groups": 2,
        "response_tokens": (10, 20, 30, 40),
        "segments": (1, 1, 2, 3),
        "interruptions": (0, 0, 1, 2),
        "queue_groups": 6,
        "queue_bytes": 3_000_000,
        "groups_outstanding": 24,
        "rollout_idle_ratio": 0.1,
        "trainer_idle_ratio": 0.25,
        "overlap_efficiency": 0.9,
        "step_s": 2.0,
    }
    return StepRecord(**{**values, **changes})
