"""A run whose vLLM engine has two data-parallel ranks: pushes, a rank and the worker killed, and what is left."""

from __future__ import annotations

import psutil
import pytest

from tests.cluster.runs import summary_is_whole
from tests.support.processes import alive

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def test_vllm_still_has_no_exchange_between_experts_on_cpus():
    """Why ``cpu_exchange`` exists. When this fails, vLLM has it on CPUs and the file can go."""
    from vllm.distributed.device_communicators.base_device_communicator import DeviceCommunicatorBase
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    for name in ("all_gatherv", "reduce_scatterv"):
        assert getattr(CpuCommunicator, name) is getattr(DeviceCommunicatorBase, name)


@pytest.mark.e2e
def test_a_run_takes_every_push_survives_a_killed_rank_and_leaves_nothing(start_run):
    run = start_run(
        trainer__steps=8,
        rollout__data_parallel_size=2,
        async_training__partial_rollout__mode="in_flight",
        recovery__backoff_s=0.01,
        eval__n=4,
    )
    run.wait_for_step(2)
    assert len(run.descendants("VLLM::EngineCore")) == 2
    run.descendants("VLLM::Worker")[-1].kill()
    run.wait_for_step(4)
    (coordinator,) = run.descendants("DPCoordinator")
    run.one("RolloutActor").kill()
    psutil.wait_procs([coordinator], timeout=30)
    assert not alive(coordinator)
    assert run.wait() == 0, run.output
    assert len(run.events("worker_restarted")) == 2
    summary_is_whole(run)
    run.assert_nothing_left()
