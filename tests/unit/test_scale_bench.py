"""The parts of ``tests.bench.scale`` that need no Ray, at a small size: they follow what they measure."""

from tests.bench import scale


async def test_a_pause_is_measured_with_and_without_a_worker():
    rows = scale.distinct_rows(scale.PROMPT_TOKENS + 4 * 1024)
    found = await scale.measure_pause(16, 1024, rows) | await scale.measure_engine(16, 1024, rows)
    assert list(found) == [
        "pause_s_16x1k",
        "pause_blocked_ms_max",
        "merged_s",
        "engine_pause_s",
        "engine_blocked_ms_max",
    ]
    assert min(found.values()) > 0


def test_a_resume_is_measured_after_a_small_and_a_large_step():
    assert min(scale.measure_resume(steps=2).values()) > 0
