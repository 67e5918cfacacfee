"""The sender tells each replica where the weights of its own host are, and nothing of the other hosts."""

from types import SimpleNamespace

from async_rl.config.loading import validate
from async_rl.weights.vllm.sender import HostsSyncClient, NcclSyncClient, SyncClient, WeightSender


def sender(client, backend="object_store"):
    made = WeightSender.__new__(WeightSender)
    tree = {"model": {"path": "m"}, "data": {"train": "t"}, "sync": {"backend": backend}}
    made._config, made._client = validate(tree), client
    made._engine = SimpleNamespace(stage=lambda: {"by_host": {"one": {"fd": 1}, "two": {"fd": 2}}})
    return made


def test_each_replica_gets_the_file_of_its_own_host_alone():
    client = HostsSyncClient(["a", "b", "c"], 1.0)
    client._hosts = {"a": ["two"], "b": ["one"], "c": ["two"]}
    assert sender(client).stage() == [{"fd": 2}, {"fd": 1}, {"fd": 2}]


def test_an_engine_over_hosts_gets_the_file_of_each_in_the_order_of_its_parts():
    client = HostsSyncClient(["a"], 1.0)
    client._hosts = {"a": ["two", "one"]}
    assert sender(client).stage() == [{"by_part": [{"fd": 2}, {"fd": 1}]}]


def test_on_one_host_all_get_the_same():
    made = sender(SyncClient(["a", "b"], 1.0), backend="shm")
    made._engine.stage = lambda: {"fd": 7}
    assert made.stage() == [{"fd": 7}] * 2


def test_ranks_that_do_not_send_and_nccl_have_nothing_to_tell():
    made = sender(SyncClient(["a"], 1.0), backend="shm")
    made._engine.stage = lambda: None
    assert made.stage() is None
    assert sender(SyncClient(["a"], 1.0), backend="nccl").stage() is None


def test_over_nccl_sglangs_engines_are_met_in_a_process_group_and_vllms_as_before():
    for engine, backend in (("sglang", "nccl"), ("vllm", None)):
        tree = {"model": {"path": "m"}, "data": {"train": "t"}, "rollout": {"engine": engine}}
        config = validate(tree | {"sync": {"backend": "nccl"}, "resources": {"device": "cuda"}})
        made = WeightSender(config, 0, source=SimpleNamespace(), host=lambda: "127.0.0.1")
        info = made._init_info(3)
        assert (info.torch_backend, info.world_size) == (backend, 4)
        assert isinstance(made._make_client(["a"]), NcclSyncClient)
        info.listening.close()
