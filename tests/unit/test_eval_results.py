"""avg@k and pass@k of an evaluation, and how certain they are."""

import itertools
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from async_rl.metrics.evaluation import Answered, EvalRules, estimate, eval_line, largest_pass, pass_at_k
from tests.support.examples import examples

RULES = EvalRules(k=2, pass_sizes=(1, 2), pass_at=1.0)


@settings(max_examples=examples(40))
@given(st.lists(st.booleans(), min_size=1, max_size=6), st.data())
def test_pass_at_k_is_the_share_of_all_choices_of_k_responses_of_which_one_passes(passes, data):
    k = data.draw(st.integers(1, len(passes)))
    choices = list(itertools.combinations(passes, k))
    assert pass_at_k(len(passes), sum(passes), k) == pytest.approx(sum(map(any, choices)) / len(choices))


def test_pass_at_more_than_there_are_responses_is_refused():
    with pytest.raises(ValueError, match="pass@5 of 1 out of 4"):
        pass_at_k(4, 1, 5)


def answered(*rewards, source=None, truncated=0):
    return Answered(rewards, tuple(10 * (n + 1) for n in range(len(rewards))), truncated, source)


def test_responses_to_one_problem_are_one_observation():
    line = eval_line("aime", [answered(1.0, 1.0), answered(0.0, 0.0), answered(1.0, 0.0), answered(0.5, 0.5)], RULES)
    means = [1.0, 0.0, 0.5, 0.5]
    assert line["avg"]["mean"] == 0.5
    assert line["avg"]["stderr"] == pytest.approx(statistics.stdev(means) / 2)
    assert line["avg"]["high"] - line["avg"]["low"] == pytest.approx(2 * 1.96 * line["avg"]["stderr"])
    assert {k: each["mean"] for k, each in line["pass"].items()} == {"1": 0.375, "2": 0.5}
    assert largest_pass(line) == 0.5
    # Twice as many responses that only repeat the others do not make anything more certain.
    again = eval_line("aime", [answered(*each.rewards * 2) for each in [answered(1.0, 1.0), answered(0.0, 0.0)]], RULES)
    once = eval_line("aime", [answered(1.0, 1.0), answered(0.0, 0.0)], RULES)
    assert again["avg"] == once["avg"]


def test_a_single_problem_has_no_interval():
    assert estimate([0.5]) == {"mean": 0.5, "stderr": None, "low": None, "high": None}


def test_results_are_also_given_by_source_where_rows_have_one():
    line = eval_line(
        "math",
        [answered(1.0, 1.0, source="b"), answered(0.0, 0.0, source="a", truncated=1), answered(1.0, 0.0)],
        RULES,
        failed=2,
    )
    assert (line["set"], line["problems"], line["failed"], line["k"]) == ("math", 3, 2, 2)
    assert (line["truncated"], line["response_tokens_mean"]) == (pytest.approx(1 / 6), 15.0)
    assert list(line["sources"]) == ["a", "b"]
    assert [line["sources"][name]["avg"]["mean"] for name in "ab"] == [0.0, 1.0]
    assert line["sources"]["a"]["truncated"] == 0.5
    assert "sources" not in eval_line("math", [answered(1.0, 0.0)], RULES)
