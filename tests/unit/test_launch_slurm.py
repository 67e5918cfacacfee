"""launch/slurm.sbatch with stubs of Slurm and Ray: which host does what, who gets a signal, what is requeued."""

import re
import signal

import pytest

from tests.support.stub_programs import ROOT, SCONTROL, SRUN, Programs

SCRIPT = (str(ROOT / "launch" / "slurm.sbatch"), "my_run.yaml", "--seed", "1")
HEAD = "10.0.0.5:20042"


def slurm_job(folder):
    """The programs, and the environment that Slurm gives to the batch script on the first of three hosts."""
    programs = Programs(folder)
    programs.add("srun", SRUN)
    programs.add("scontrol", SCONTROL)
    programs.env |= {
        "SLURM_JOB_ID": "30042",
        "SLURM_JOB_NODELIST": "n1,n2,n3",
        "SLURMD_NODENAME": "n1",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_CPUS_ON_NODE": "4",
        "ADDRESSES": "10.0.0.5",
        "EXPECTED_HEAD": HEAD,
        "JOIN_S": "20",
    }
    return programs


@pytest.fixture
def slurm(tmp_path):
    programs = slurm_job(tmp_path)
    yield programs
    programs.close()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """What was called by a job on three hosts whose driver has ended with 0, submitted from a shell that knows another
    cluster, with --export=NONE."""
    programs = slurm_job(tmp_path_factory.mktemp("finished"))
    code, output = programs.run("bash", *SCRIPT, DRIVER_EXIT="0", SLURM_EXPORT_ENV="NONE", RAY_ADDRESS="elsewhere:6379")
    programs.close()
    assert code == 0, output
    return programs.calls


def stop(slurm, number, **env):
    """Start a job, send its batch script a signal once the driver runs; return its exit code and output."""
    job = slurm.start("bash", *SCRIPT, **env)
    slurm.await_call("driver joins")
    job.send_signal(number)
    output, _ = job.communicate(timeout=30)
    return job.returncode, output


def token(calls):
    """The token that srun and the driver got, which must be one."""
    (found,) = {match[1] for call in calls if (match := re.match(r"(?:srun|driver joins \S+) token=(\S+)", call))}
    return found


def test_the_first_host_is_the_head_and_the_others_join_it(finished):
    (head,) = [call for call in finished if call.startswith("ray start --head")]
    assert "--node-ip-address=10.0.0.5 --port=20042 " in head
    assert "--num-cpus=4" in head
    (step,) = [call for call in finished if call.startswith("srun --")]
    assert "--nodelist=n2,n3" in step
    assert "--nodes=2 --ntasks=2" in step
    workers = [call for call in finished if call.startswith(f"ray start --address={HEAD}")]
    assert len(workers) == 2
    assert all("--num-cpus=6" in call for call in workers), "each host says itself how many cores the job has there"


def test_workers_start_after_the_head_and_the_driver_after_all(finished):
    started = [index for index, call in enumerate(finished) if call.startswith("ray start")]
    assert finished[started[0]].startswith("ray start --head")
    assert len(started) == 3
    answered = next(index for index, call in enumerate(finished) if call.startswith("ray health-check"))
    (step,) = [index for index, call in enumerate(finished) if call.startswith("srun --")]
    (driver,) = [index for index, call in enumerate(finished) if call.startswith(f"driver joins {HEAD} ")]
    assert answered < step < started[1]
    assert started[2] < driver


def test_every_process_of_a_job_gets_the_same_token(finished):
    assert re.fullmatch("[0-9a-f]{64}", token(finished))
    assert any(call.endswith("mode=token") for call in finished if call.startswith("driver joins"))


def test_srun_passes_the_environment_on_and_another_cluster_is_forgotten(finished):
    assert any(call.startswith("srun token=") and call.endswith("export=ALL") for call in finished)
    assert "ray has RAY_ADDRESS=none" in finished


def test_a_job_always_restores_its_run(finished):
    trained = [call for call in finished if call.startswith("async-rl train") and "--dry-run" not in call]
    assert trained == ["async-rl train my_run.yaml --seed 1 --resume auto"]


def test_everything_ends_with_the_driver(finished):
    assert finished.count("ray ended") == 3
    assert not any(call.startswith("scontrol requeue") for call in finished)


def test_a_host_that_does_not_join_ends_the_job(slurm):
    slurm.add("srun", "exit 1")
    code, output = slurm.run("bash", *SCRIPT, JOIN_S="4")  # the head has it too, and bash counts whole seconds
    assert code == 1
    assert "1 of 3 hosts joined within 4 s" in output
    assert not any(call.startswith("driver joins") for call in slurm.calls)


def test_one_host_needs_no_srun_and_a_token_of_the_user_is_kept(slurm):
    code, output = slurm.run("bash", *SCRIPT, DRIVER_EXIT="0", SLURM_JOB_NODELIST="n1", RAY_AUTH_TOKEN="mine")
    assert code == 0, output
    assert token(slurm.calls) == "mine"
    assert not any(call.startswith("srun") for call in slurm.calls)


def test_the_exit_code_of_a_driver_that_fails_is_the_jobs_and_each_job_has_a_token_of_its_own(slurm, finished):
    code, output = slurm.run("bash", *SCRIPT, DRIVER_EXIT="137")
    assert code == 137, output
    assert token(slurm.calls) not in ("none", token(finished))
    assert not any(call.startswith("scontrol requeue") for call in slurm.calls)
    assert slurm.calls.count("ray ended") == 3


def test_wrong_settings_end_the_job_before_anything_starts(slurm):
    code, output = slurm.run("bash", *SCRIPT, DRY_RUN_EXIT="2")
    assert code == 2, output
    assert [call.split()[0] for call in slurm.calls] == ["async-rl"]


def test_sigterm_reaches_the_driver_and_requeues_the_job(slurm):
    code, output = stop(slurm, signal.SIGTERM)
    assert code == 130, output
    assert slurm.calls.count("driver got SIGTERM") == 1
    assert "scontrol requeue incomplete 30042" in slurm.calls
    assert slurm.calls.index("driver got SIGTERM") < slurm.calls.index("ray ended"), "Ray outlives the checkpoint"


def test_sigint_stops_the_run_for_good(slurm):
    code, output = stop(slurm, signal.SIGINT)
    assert code == 130, output
    assert "driver got SIGTERM" in slurm.calls
    assert not any(call.startswith("scontrol requeue") for call in slurm.calls)


@pytest.mark.parametrize(("env", "said"), [({"EVERY": "0"}, "checkpoint.every"), ({"REQUEUE": "0"}, "")])
def test_a_run_without_checkpoints_or_with_requeue_off_is_not_requeued(slurm, env, said):
    code, output = stop(slurm, signal.SIGTERM, **env)
    assert code == 130
    assert said in output
    assert not any(call.startswith("scontrol requeue") for call in slurm.calls)


def test_a_signal_while_hosts_are_awaited_is_answered_at_once(slurm):
    slurm.add("srun", "exit 1")
    job = slurm.start("bash", *SCRIPT)
    slurm.await_call("srun")
    job.send_signal(signal.SIGTERM)
    output, _ = job.communicate(timeout=10)
    assert job.returncode >= 128, output
    assert not any(call.startswith("driver joins") for call in slurm.calls)
    assert "scontrol requeue incomplete 30042" in slurm.calls


def test_a_container_runs_ray_and_the_driver(slurm):
    slurm.add("apptainer", 'shift 3; exec "$@"')
    code, output = slurm.run("bash", *SCRIPT, DRIVER_EXIT="0", IN_CONTAINER="apptainer exec --nv image.sif")
    assert code == 0, output
    inside = [call for call in slurm.calls if call.startswith("apptainer")]
    assert sum(call.endswith("ray_host.sh head") for call in inside) == 1
    assert sum("ray_host.sh worker" in call for call in inside) == 2
    assert sum("async-rl train" in call for call in inside) == 2


def test_submitted_elsewhere_it_says_so(slurm, tmp_path):
    code, output = slurm.run("bash", *SCRIPT, SLURM_SUBMIT_DIR=str(tmp_path))
    assert code == 2
    assert "ASYNC_RL_DIR" in output
