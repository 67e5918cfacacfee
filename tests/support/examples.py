"""How many examples of a property are tried: all in ``make test-all``, a quarter everywhere else."""

import hypothesis

# What Hypothesis tries of a property that names no number.
ALL_EXAMPLES = 100


def register_profiles() -> None:
    """Register the profiles "all" and "quarter", and load the latter; --hypothesis-profile chooses the other.

    How long an example takes says what else the machine does, so no property fails for it.
    """
    for name, count in (("all", ALL_EXAMPLES), ("quarter", ALL_EXAMPLES // 4)):
        hypothesis.settings.register_profile(
            name, deadline=None, max_examples=count, suppress_health_check=[hypothesis.HealthCheck.too_slow]
        )
    hypothesis.settings.load_profile("quarter")


def examples(most: int) -> int:
    """Return the share of ``most`` examples that this run tries."""
    return max(1, most * hypothesis.settings.default.max_examples // ALL_EXAMPLES)
