"""SGLang, the trainer and transformers compute the same function, also after interruptions: the tests of the oracle."""

from unittest import mock

import pytest
import pytest_asyncio

from async_rl.rollout.engine.sglang import answers
from tests.integration.test_oracle import (  # noqa: F401
    RUNNING,
    folders,
    interrupted,
    pusher,
    test_engine_trainer_and_transformers_agree_on_every_token,
    test_exact_every_token_agrees_at_the_version_that_sampled_it,
    test_faults_that_cannot_be_a_routers_choice_are_refused_at_the_border,
    test_preserve_agrees_before_the_first_resume_point_and_not_after,
    test_replace_agrees_after_the_last_resume_point_and_not_before,
    test_what_differs_differs_because_its_rows_are_not_those_of_its_own_call,
    trainer,
    weights,
)
from tests.support.engine_checkpoint import engine_config, running
from tests.support.needs import NEEDS_SGLANG

pytestmark = [
    pytest.mark.engine,
    pytest.mark.megatron,
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="module"),
    NEEDS_SGLANG,
]


@pytest.fixture(scope="module")
def dense():
    """None: SGLang computes every layer of Qwen3-MoE as a mixture."""
    return ()


@pytest.fixture(scope="module")
def config(folders, tmp_path_factory):  # noqa: F811
    return engine_config(folders[0], runs=tmp_path_factory.mktemp("runs"), engine="sglang", max_num_seqs=RUNNING)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(config):
    # So that responses are cut anywhere.
    with mock.patch.object(answers, "STREAM_INTERVAL", 1):
        async with running(config) as engine:
            yield engine
