"""The typed proxies call methods that the actors have; one rank that dies is told from one that failed."""

import asyncio
import inspect
from types import SimpleNamespace

import pytest
import torch
from ray.exceptions import ActorDiedError, ObjectLostError, RayTaskError

from async_rl.config.loading import validate
from async_rl.driver import actors
from async_rl.driver.actors import RolloutHandle, RolloutWorkers, TrainerRanks
from async_rl.driver.places import Place
from async_rl.driver.remote_files import RemoteFiles
from async_rl.errors import TrainerDied
from async_rl.rollout.actor import RolloutActor
from async_rl.rollout.stats import WorkerStats
from async_rl.runtime import timeouts
from async_rl.trainer.actor import TrainerActor


def public(proxy):
    return [name for name, _ in inspect.getmembers(proxy, inspect.isfunction) if not name.startswith("_")]


def done():
    future = asyncio.get_running_loop().create_future()
    future.set_result(None)
    return future


class Recorded:
    """A remote handle that notes how each method was called."""

    def __init__(self, result=None):
        self.calls, self._result = {}, result

    def __getattr__(self, name):
        class Method:
            @staticmethod
            def remote(*arguments, **named):
                self.calls[name] = (arguments, named)
                return self._result() if self._result else done()

            @staticmethod
            def options(**_):
                return Method

        return Method


def ranks(*actors):
    subject = object.__new__(TrainerRanks)
    subject._ranks = list(actors)
    subject._remote = RemoteFiles(validate({"model": {"path": "m"}, "data": {"train": "t"}}))
    return subject


def arguments(method):
    """One value for each parameter, and the names of those that are keyword-only."""
    parameters = list(inspect.signature(method).parameters.values())[1:]
    named = {p.name: None for p in parameters if p.kind is p.KEYWORD_ONLY}
    return {p.name: [] for p in parameters if p.name not in named}, named


@pytest.mark.parametrize("name", public(RolloutHandle))
async def test_every_call_of_a_rollout_worker_fits_its_actor(name):
    actor = Recorded()
    positional, named = arguments(getattr(RolloutHandle, name))
    call = getattr(RolloutHandle(actor), name)(*positional.values(), **named)
    if inspect.isawaitable(call):
        await call
    given, given_by_name = actor.calls[name]
    inspect.signature(getattr(RolloutActor, name)).bind(None, *given, **given_by_name)


@pytest.mark.parametrize("name", [name for name in public(TrainerRanks) if name != "replace"])
async def test_every_call_of_the_trainer_fits_its_actor(name):
    first, second = Recorded(empty), Recorded(empty)
    positional, named = arguments(getattr(TrainerRanks, name))
    if "shares" in positional:
        positional["shares"] = ["of rank 0", "of rank 1"]
    call = getattr(ranks(first, second), name)(*positional.values(), **named)
    await (asyncio.gather(*call) if isinstance(call, list) else call)
    for rank, actor in enumerate((first, second)):
        given, given_by_name = actor.calls[name]
        inspect.signature(getattr(TrainerActor, name)).bind(None, *given, **given_by_name)
        assert "shares" not in positional or given[0] == f"of rank {rank}"


class Stats:
    def __init__(self, replica, **counts):
        self.actors, self._stats = [replica], WorkerStats(replica, **counts)

    async def stats(self):
        return self._stats


async def test_the_counters_of_a_replica_that_has_left_stay_and_go_on_when_it_comes_back(monkeypatch):
    monkeypatch.setattr(actors.ray, "kill", lambda actor: None)
    given_up = []
    places = SimpleNamespace(give_up=given_up.append, of_replica=lambda replica: None)
    subject = RolloutWorkers(None, None, places)
    subject.workers = {1: Stats(1, version=4, groups=7), 0: Stats(0, version=4, groups=3)}
    assert [(stats.replica, stats.groups) for stats in await subject.stats(1.0)] == [(0, 3), (1, 7)]
    subject.remove(1)
    assert (given_up, list(subject.workers)) == ([1], [0])
    assert [(stats.groups, stats.gone) for stats in await subject.stats(1.0)] == [(3, False), (7, True)]
    kept = dict(subject.workers)
    subject.workers.clear()
    assert [stats.groups for stats in await subject.stats(1.0)] == [7], "no replica has a host"
    subject.workers |= kept
    monkeypatch.setattr(actors, "start_rollout_worker", lambda config, replica, *_: Stats(replica, groups=2, version=9))
    subject.replace(1)
    assert [(stats.groups, stats.gone, stats.version) for stats in await subject.stats(1.0)] == [
        (3, False, 4),
        (9, False, 9),
    ]


async def empty():
    return []


async def died():
    raise ActorDiedError()


async def failed():
    raise ValueError("a sum that is no number")


async def waits():
    await asyncio.sleep(3600)


async def computed():
    return [1.0]


async def test_the_result_is_that_of_rank_0():
    assert await ranks(Recorded(computed), Recorded()).logprobs([], None) == [1.0]


async def test_a_rank_that_died_is_named_though_another_failed_first(monkeypatch):
    monkeypatch.setattr(timeouts, "RANK_DEATH_S", 0.05)

    async def died_later():
        await asyncio.sleep(0.01)
        raise ActorDiedError()

    with pytest.raises(TrainerDied, match="trainer rank 1 died during finish_step"):
        await ranks(Recorded(failed), Recorded(died_later)).finish_step()
    with pytest.raises(TrainerDied, match="trainer rank 0 died during finish_step"):
        await ranks(Recorded(died), Recorded(waits)).finish_step()


async def test_what_a_rank_raised_is_raised_when_none_died(monkeypatch):
    monkeypatch.setattr(timeouts, "RANK_DEATH_S", 0.01)
    with pytest.raises(ValueError, match="no number"):
        await ranks(Recorded(waits), Recorded(failed)).finish_step()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("no memory\nfor a tensor"),
        RuntimeError("connection reset by peer"),
        ObjectLostError("1", None, ""),
    ],
)
async def test_a_fault_of_the_machine_in_training_is_a_death(monkeypatch, error):
    monkeypatch.setattr(timeouts, "RANK_DEATH_S", 0.01)

    async def faulty():
        raise RayTaskError("finish_step", "traceback", error)

    trainer = ranks(Recorded(faulty), Recorded(waits))
    with pytest.raises(TrainerDied, match=f"the trainer failed in finish_step: {type(error).__name__}"):
        await trainer.finish_step()
    with pytest.raises(TrainerDied, match=f"the trainer failed in fetch: {type(error).__name__}"):
        await trainer.fetch([[], []])
    with pytest.raises(RayTaskError):
        await trainer.begin_save(None)


GLOO = RuntimeError("[/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [10.0.0.2]:43407: Connection reset")
NCCL = torch.distributed.DistBackendError("NCCL error: remote process exited")


@pytest.mark.parametrize("error", [GLOO, NCCL])
@pytest.mark.parametrize("call", [lambda trainer: trainer.logprobs([], None), lambda trainer: trainer.send_weights(1)])
async def test_a_peer_that_is_lost_is_a_death_whatever_the_ranks_were_doing(monkeypatch, error, call):
    """The host of a rank is gone. Its peers notice it at once, and Ray up to a minute later."""
    monkeypatch.setattr(timeouts, "RANK_DEATH_S", 0.01)

    async def lost_peer():
        raise RayTaskError("logprobs", "traceback", error)

    with pytest.raises(TrainerDied, match=f"the trainer lost a rank during .*: {type(error).__name__}"):
        await call(ranks(Recorded(lost_peer), Recorded(waits)))


async def test_the_groups_that_any_rank_cannot_read_are_lost():
    async def lost():
        return ["b", "a"]

    async def others():
        return ["a", "c"]

    assert await ranks(Recorded(lost), Recorded(others)).fetch([[], []]) == ["b", "a", "c"]


async def test_ranks_meet_where_the_first_of_them_opened_a_store():
    async def address():
        return "10.0.0.7:1234"

    first, second = Recorded(address), Recorded()
    await ranks(first, second).start("checkpoint")
    for actor in (first, second):
        assert list(actor.calls) == ["open_store", "start"]
        assert actor.calls["start"][0] == ("checkpoint", "10.0.0.7:1234")
    alone = Recorded()
    await ranks(alone).start()
    assert alone.calls == {"start": ((None, None), {})}


NOWHERE = Place(None)


@pytest.fixture
def created(monkeypatch):
    """Return the options with which an actor is created, and its arguments."""
    seen = {}

    def remote(_):
        def options(**given):
            seen.update(given)
            return SimpleNamespace(remote=lambda *_, **named: seen.update(named))

        return SimpleNamespace(options=options)

    monkeypatch.setattr(actors.ray, "remote", remote)

    def create(device, place=NOWHERE, engine=False, share_gpu=False, **trainer):
        resources = {"device": device, "trainer_threads": 2, "share_gpu": share_gpu}
        tree = {"model": {"path": "m"}, "data": {"train": "t"}, "resources": resources, "trainer": trainer}
        if engine:
            actors.start_rollout_worker(validate(tree), 0, None, [place])
        else:
            actors.start_trainer(validate(tree), 0, place, one_host=False)
        return seen

    return create


@pytest.mark.parametrize("tf32", [False, True])
def test_a_rank_on_a_gpu_rounds_as_the_settings_say_and_does_not_fragment_its_memory(monkeypatch, created, tf32):
    for name in ("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    given = created("cuda", tf32=tf32)["runtime_env"]["env_vars"]
    assert given.get("NVIDIA_TF32_OVERRIDE") == (None if tf32 else "0")
    assert given.get("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE") == ("1" if tf32 else None)
    assert given["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:512")
    assert created("cuda")["runtime_env"]["env_vars"]["PYTORCH_CUDA_ALLOC_CONF"] == "max_split_size_mb:512"
    assert "NVIDIA_TF32_OVERRIDE" not in created("cpu")["runtime_env"]["env_vars"]


def test_a_rank_has_the_threads_of_the_settings_on_a_cpu_and_more_than_one_beside_a_gpu(monkeypatch, created):
    on_cpu = created("cpu")
    assert on_cpu["num_gpus"] == 0
    assert on_cpu["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] == "2"
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in on_cpu["runtime_env"]["env_vars"]
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    on_gpu = created("cuda")
    assert on_gpu["num_gpus"] == 1
    assert on_gpu["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] == "8"
    assert on_gpu["runtime_env"]["env_vars"]["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    assert created("cuda")["runtime_env"]["env_vars"]["CUDA_DEVICE_MAX_CONNECTIONS"] == "32"


@pytest.mark.parametrize("engine", [False, True])
def test_each_has_a_gpu_or_half_of_one(created, engine):
    assert created("cuda", engine=engine)["num_gpus"] == 1
    assert created("cuda", engine=engine, share_gpu=True)["num_gpus"] == 0.5


def test_an_engine_over_hosts_has_an_actor_on_each_which_ends_with_its_worker(monkeypatch):
    made, killed = [], []

    def remote(kind):
        def create(*arguments):
            made.append((kind.__name__, given, arguments))
            return f"actor {len(made)}"

        given = {}
        return SimpleNamespace(options=lambda **options: given.update(options) or SimpleNamespace(remote=create))

    monkeypatch.setattr(actors.ray, "remote", remote)
    monkeypatch.setattr(actors.ray, "kill", killed.append)
    rollout = {"tensor_parallel_size": 8, "hosts_per_engine": 2}
    tree = {"model": {"path": "m"}, "data": {"train": "t"}, "resources": {"device": "cuda"}, "rollout": rollout}
    places = [Place(None, {"scheduling_strategy": where}) for where in ("here", "there")]
    subject = RolloutWorkers(validate(tree), "queue", SimpleNamespace(of_replica=lambda replica: places))
    handle = subject.replace(3)
    (part, worker) = made
    assert (part[0], part[2][1:], part[1]["scheduling_strategy"]) == ("EnginePart", (3, 1, None), "there")
    assert (worker[0], worker[2][1:], worker[1]["scheduling_strategy"]) == (
        "RolloutActor",
        (3, "queue", None, ["actor 1"]),
        "here",
    )
    assert {each[1]["num_gpus"] for each in made} == {4}
    assert (handle.actor, subject.actors) == ("actor 2", ["actor 2", "actor 1"])
    subject.kill(3)
    assert killed == ["actor 2", "actor 1"]


def test_an_actor_is_created_at_its_place(created):
    assert created("cpu", Place(None, {"scheduling_strategy": "there"}))["scheduling_strategy"] == "there"
