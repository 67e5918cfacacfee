"""What doctor says of the hosts of a cluster. Each host is a record; each lack is made, one at a time."""

import dataclasses

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from async_rl import doctor
from async_rl.config.loading import validate
from async_rl.doctor import cluster, placement
from async_rl.doctor import machine as probes
from async_rl.doctor.host_report import HostReport, Needs, table
from async_rl.errors import ConfigError, ResourceError
from tests.support.examples import examples

GB = 10**9
MODEL = {"config.json": "aa", "model.safetensors": "bb"}


def config(engines=1, size=8, ranks=8, **sections):
    """The settings of a run with so many engines of so many GPUs each, and so many trainer ranks."""
    base = {
        "model": {"path": "/models/a"},
        "data": {"train": "/data/train.jsonl"},
        "rollout": {"replicas": engines, "tensor_parallel_size": size},
        "trainer": {"parallel": {"dp": ranks}},
        "sync": {"backend": "nccl"},
        "runs": "/shared/runs",
        "cluster": {"address": "10.0.0.1:6379"},
        "resources": {"device": "cuda"},
    }
    return validate({**base, **sections})


def cpu_config(engines=1, ranks=1, engine_threads=1, trainer_threads=1, **sections):
    resources = {"device": "cpu", "engine_threads": engine_threads, "trainer_threads": trainer_threads}
    return config(engines, 1, ranks, **{"sync": {"backend": "auto"}, "resources": resources} | sections)


def host(number: int, **changes) -> HostReport:
    """A host of eight GPUs that lacks nothing."""
    address = f"10.0.0.{number}"
    report = HostReport(
        name=address,
        address=address,
        node_id=f"node{number}",
        gpus=8,
        free_gpus=8,
        python="3.11.9",
        code="0.1.0 (3fa2c1d0)",
        packages={"ray": "2.60.0", "torch": "2.13.0", "vllm": "0.30.0", "megatron-core": "0.16.1", "msgpack": "1.1.0"},
        cpus=96,
        cores=96,
        memory_bytes=900 * GB,
        shm_bytes=400 * GB,
        compiler=True,
        interfaces={"lo": ["127.0.0.1"], "eth0": [address]},
        paths={"model.path": MODEL, "data.train": {"": "cc"}},
        modules={},
        shares_runs=True,
        writes_runs=True,
    )
    return dataclasses.replace(report, **changes)


def judged(hosts, settings=None, own=None, **changes):
    settings = settings or config()
    needed = dataclasses.replace(Needs(settings.resources.device, shm_bytes=2 * GB), **changes)
    return cluster.judge(settings, needed, hosts, own or hosts[0])


def fault(hosts, settings=None, own=None, **changes) -> str:
    """The one FAIL, in one line, as a run would end with."""
    fails = [check for check in judged(hosts, settings, own, **changes) if check.status == "FAIL"]
    assert len(fails) == 1, fails
    line = f"{fails[0].name}: {fails[0].detail}; {fails[0].fix}"
    assert "\n" not in line
    return line


def warnings(found) -> list[str]:
    return [f"{check.name}: {check.detail}" for check in found if check.status == "warn"]


def test_hosts_that_have_everything():
    found = judged([host(1), host(2)])
    assert {check.status for check in found} == {"ok"}
    assert ("GPUs", "16 on 2 hosts, 16 needed") in {(check.name, check.detail) for check in found}


def test_the_driver_may_have_no_gpu_and_another_build_of_torch():
    own = host(1, gpus=0, free_gpus=0, packages=host(1).packages | {"torch": "2.13.0+cpu"})
    found = judged([own, host(2), host(3)], own=own)
    assert {check.status for check in found} == {"ok"}
    auto = config(resources={"device": "auto"})
    assert cluster.device_of(auto, [own, host(2)]) == "cuda"
    assert cluster.device_of(auto, [own]) == "cpu"
    assert cluster.device_of(config(resources={"device": "cuda"}), [own]) == "cuda"


def test_a_host_that_does_not_answer_is_named():
    silent = HostReport("10.0.0.2", "10.0.0.2", "node2", gpus=8, fault="no answer within 60 s")
    assert fault([host(1), silent, host(3)]).startswith("hosts: 10.0.0.2: no answer within 60 s; ")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"python": "3.12.1"}, "Python: the driver has 3.11, other hosts do not (10.0.0.2: 3.12)"),
        (
            {"code": "0.1.0 (77aa0000)"},
            "async_rl: the driver has 0.1.0 (3fa2c1d0), other hosts do not (10.0.0.2: 0.1.0",
        ),
        (
            {"packages": host(2).packages | {"vllm": "0.29.0"}},
            "vllm: the driver has 0.30.0, other hosts do not (10.0.0.2: 0.29.0)",
        ),
        ({"packages": {}}, None),
        ({"packages": host(2).packages | {"torch": "2.13.0+cpu"}}, "torch build: a CPU build on 10.0.0.2"),
    ],
)
def test_another_version_of_code_python_or_a_package(changes, line):
    hosts = [host(1), host(2, **changes)]
    if line is None:
        assert [check.name for check in judged(hosts) if check.status == "FAIL"] == list(host(1).packages)
    else:
        assert fault(hosts).startswith(line)


def test_a_path_that_only_one_host_has():
    assert fault([host(1), host(2, paths={"data.train": {"": "cc"}})]).startswith(
        "model.path: the path exists where the driver is, but is not on 10.0.0.2; use a folder that all hosts share"
    )
    other = host(2).paths | {"model.path": MODEL | {"config.json": "00"}}
    assert "but has other content on 10.0.0.2: config.json;" in fault([host(1), host(2, paths=other)])
    # The error is one of the settings, though the machine shows it.
    (check,) = (check for check in judged([host(1), host(2, paths=other)]) if check.status == "FAIL")
    assert check.error is ConfigError


def test_data_that_only_the_driver_has_is_a_warning():
    found = judged([host(1), host(2, paths={"model.path": MODEL})])
    (line,) = warnings(found)
    assert line.startswith("data.train: ")
    assert "only the driver reads it" in line
    assert not doctor.failed(found)


def test_a_folder_of_runs_that_is_not_shared():
    assert fault([host(1), host(2, shares_runs=False)]).startswith(
        "runs: /shared/runs must be one folder for all hosts, but what the driver writes there is not on 10.0.0.2; "
    )
    assert "cannot be written to on 10.0.0.2" in (line := fault([host(1), host(2, writes_runs=False)]))
    assert line.endswith("on a file system that all hosts share, or cluster.shared_fs to false")


def test_a_folder_of_runs_that_the_driver_s_host_alone_has():
    settings = config(cluster={"address": "10.0.0.1:6379", "shared_fs": False})
    elsewhere = host(2, shares_runs=False, writes_runs=False)
    found = judged([host(1), elsewhere], settings=settings)
    assert not doctor.failed(found)
    assert ("runs", "/shared/runs is on 10.0.0.1 alone, to which other hosts send what they write") in {
        (check.name, check.detail) for check in found
    }
    full = "nothing can be written to /tmp/async_rl-0 (Read-only file system)"
    assert fault([host(1), host(2, spool_fault=full)], settings=settings) == (
        f"cluster.local_dir: 10.0.0.2: {full}; set cluster.local_dir to a folder that each host has, and where it can "
        "be written"
    )
    assert not doctor.failed(judged([host(1, spool_fault=full), host(2)], settings=settings)), "it needs none"
    # Models are still read on each host.
    assert fault([host(1), host(2, paths=host(2).paths | {"model.path": None})], settings=settings).endswith(
        "copy it to the same place on each (cluster.shared_fs: false is for the run folder alone)"
    )


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"python": "3.12.1"}, "Python: the driver has 3.11, other hosts do not (10.0.0.2: 3.12)"),
        ({"code": "0.0.9 (0)"}, "async_rl: the driver has 0.1.0 (3fa2c1d0), other hosts do not (10.0.0.2: 0.0.9 (0))"),
        ({"packages": {}}, "ray: the driver has 2.60.0, other hosts do not (10.0.0.2: not installed)"),
        ({"paths": {}}, "model.path: the path exists where the driver is, but is not on 10.0.0.2"),
        ({"shares_runs": False}, "runs: /shared/runs must be one folder for all hosts, but what the driver writes"),
        ({"interfaces": {}}, "cluster.interface: eth0 is no interface with an address on every host"),
        ({"fault": "ModuleNotFoundError: No module named 'async_rl'"}, "hosts: 10.0.0.2: ModuleNotFoundError"),
    ],
)
def test_what_one_host_lacks_is_what_a_run_would_be_refused_for(changes, line):
    settings = config(cluster={"address": "10.0.0.1:6379", "interface": "eth0"})
    found = cluster.lack(settings, host(2, **changes), host(1))
    assert f"{found.name}: {found.detail}".startswith(line)
    assert found.fix


def test_one_host_need_not_have_room_for_a_run():
    assert cluster.lack(config(), host(2, gpus=0, shm_bytes=0), host(1)) is None


def test_two_copies_of_the_groups_fit_the_object_stores_of_all_hosts():
    settings = config(queue={"copies": 2, "max_bytes": 3 * GB})

    def found(*stores):
        hosts = [host(number, store_bytes=size, gpus=16) for number, size in enumerate(stores, start=1)]
        (check,) = (each for each in judged(hosts, settings=settings) if each.name == "queue.copies")
        return check.status, check.detail

    detail = "2: finished groups take up to 6.0 GB in the object stores of all hosts, which have "
    assert found(3 * GB, 3 * GB) == ("ok", f"{detail}6.0 GB")
    assert found(4 * GB, 1 * GB) == ("warn", f"{detail}5.0 GB: Ray then writes groups to disk")
    assert found(9 * GB) == ("warn", "2, but the cluster has one host: groups have one copy until another host joins")
    assert "queue.copies" not in {check.name for check in judged([host(1), host(2)])}


def test_modules_of_the_user():
    losses = {"parallel": {"dp": 8}, "loss": {"policy": "my.losses:loss"}}
    settings = config(reward={"function": "my.rewards:score"}, trainer=losses)
    assert cluster.user_modules(settings) == {"my.rewards": "reward.function", "my.losses": "trainer.loss.policy"}
    mine = {"my.rewards": "1", "my.losses": "2"}
    absent, other = host(2, modules={"my.losses": "2"}), host(2, modules=mine | {"my.losses": "0"})
    own = host(1, modules=mine)
    assert fault([own, absent], settings).startswith(
        "reward.function: the module my.rewards is not found on 10.0.0.2; "
    )
    assert fault([own, other], settings).startswith("trainer.loss.policy: the module my.losses is another on 10.0.0.2 ")


@pytest.mark.parametrize(
    ("gpus", "layout", "line"),
    [
        ((4, 4), (1, 8, 1), "no host has 8 GPUs for an engine (10.0.0.1: 4, 10.0.0.2: 4)"),
        (
            (8, 8),
            (2, 8, 8),
            "16 GPUs in all (10.0.0.1: 8, 10.0.0.2: 8), but 24 are needed for 2 engines of 8 and 8 trainer ranks",
        ),
        (
            (7, 7),
            (3, 4, 2),
            "14 GPUs are enough in all (10.0.0.1: 7, 10.0.0.2: 7), but 1 of 3 engines of 4 and 2 trainer ranks find no "
            "host with 4 free: each needs its GPUs on one host",
        ),
    ],
)
def test_too_few_gpus_on_every_host(gpus, layout, line):
    hosts = [host(number, gpus=count, free_gpus=count) for number, count in enumerate(gpus, 1)]
    assert fault(hosts, config(*layout)).startswith(
        f"GPUs: {line}; lower rollout.replicas or rollout.tensor_parallel_size, trainer.parallel, or join"
    )


def test_the_parts_of_an_engine_find_no_room_on_one_host():
    spanning = {"rollout": {"tensor_parallel_size": 8, "hosts_per_engine": 2}}
    assert fault([host(1, gpus=16, free_gpus=16)], config(ranks=8, **spanning)).startswith(
        "GPUs: 16 GPUs are enough in all (10.0.0.1: 16), but 2 of 2 engine parts of 4 and 8 trainer ranks find no host "
        "with 4 free: each needs its GPUs on one host, and the parts of an engine need different hosts; lower"
    )
    lines = table(config(ranks=8, **spanning), Needs("cuda"), [host(1), host(2)], host(1)).splitlines()
    assert [line.split("  ")[-1] for line in lines[1:]] == ["1 engine part, 4 trainer ranks"] * 2


def test_engines_and_ranks_that_fit_only_with_the_engines_first_are_accepted():
    """Four ranks packed on the first host would leave room for one engine there and one on the other."""
    hosts = [host(number, gpus=6, free_gpus=6) for number in (1, 2)]
    assert {check.status for check in judged(hosts, config(2, 4, 4))} == {"ok"}
    lines = table(config(2, 4, 4), Needs("cuda"), hosts, hosts[0]).splitlines()
    assert [line.endswith("1 engine, 2 trainer ranks") for line in lines] == [False, True, True]


LAYOUTS = st.fixed_dictionaries(
    {"dp": st.integers(1, 4), "tp": st.integers(1, 4), "cp": st.integers(1, 2), "pp": st.integers(1, 2)}
)


@given(
    room=st.lists(st.integers(0, 9), max_size=5),
    engines=st.integers(1, 4),
    size=st.integers(1, 8),
    parallel=LAYOUTS,
)
@hypothesis.settings(max_examples=examples(400))
def test_the_doctor_says_yes_if_and_only_if_the_run_places_all(room, engines, size, parallel):
    hosts = [host(number, gpus=gpus, free_gpus=gpus) for number, gpus in enumerate(room, 1)]
    settings = config(engines, size, trainer={"parallel": parallel})
    places = placement.plan(settings, [{"GPU": float(gpus)} for gpus in room])
    found = judged(hosts, settings, own=host(9, gpus=0))
    assert doctor.failed(found) != places.fits
    lines = [check.detail for check in found if check.name == "GPUs"]
    assert len(lines) == 1
    assert ("needed" in lines[0]) or (f"{size} GPUs for" in lines[0]) or (f"{size} free" in lines[0])


@given(
    room=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    engines=st.integers(1, 40),
    ranks=st.integers(1, 40),
    threads=st.tuples(st.integers(1, 6), st.integers(1, 6)),
)
@hypothesis.settings(max_examples=examples(400))
def test_on_cpu_the_doctor_warns_if_and_only_if_processes_will_share_cores(room, engines, ranks, threads):
    hosts = [host(number, gpus=0, cpus=cpus) for number, cpus in enumerate(room, 1)]
    settings = cpu_config(engines, ranks, *threads)
    places = placement.plan(settings, [{"CPU": float(cpus)} for cpus in room])
    (check,) = (check for check in judged(hosts, settings) if check.name == "CPUs")
    expected = "FAIL" if not places.fits else "warn" if places.sharing > 1 else "ok"
    assert check.status == expected


def test_of_a_run_whose_replicas_come_and_go_the_trainer_must_fit_and_the_table_shows_how_many_engines_do():
    hosts, layout = [host(1), host(2)], {"rollout": {"replicas": {"min": 1, "max": 9}, "tensor_parallel_size": 4}}
    settings = config(**layout, trainer={"parallel": {"dp": 6}}, resources={"device": "cuda"})
    (check,) = [check for check in judged(hosts, settings) if check.name == "GPUs"]
    assert check.detail == (
        "16 on 2 hosts, 10 needed for 1 engine (rollout.replicas.min) and the trainer; 2 fit of 9 (max), the others "
        "wait for hosts"
    )
    assert check.status == "ok"
    assert "2 engines" in table(settings, Needs("cuda"), hosts, hosts[0])
    waits = judged(hosts[:1], settings)
    assert warnings(waits) == [
        "GPUs: 8 GPUs in all (10.0.0.1: 8), but 10 are needed for 1 engine of 4 and 6 trainer ranks; the trainer fits, "
        "and the run waits for hosts, for watchdog.abort_s at most"
    ]
    assert not doctor.failed(waits), "an autoscaler adds hosts for what waits"
    few = host(1, gpus=4, free_gpus=4)
    assert fault([few], settings, few).startswith("GPUs: 4 GPUs in all")


def test_gpus_that_others_use_are_a_warning():
    found = judged([host(1, free_gpus=3), host(2)])
    assert warnings(found) == [
        "free GPUs: 11 free GPUs in all (10.0.0.1: 3, 10.0.0.2: 8), but 16 are needed for 1 engine of 8 and 8 trainer "
        "ranks"
    ]
    assert not doctor.failed(found)


def test_hosts_without_gpus_need_nothing_of_a_run_on_gpus():
    bare = HostReport("10.0.0.3", "10.0.0.3", "node3", cpus=4, python="3.9.0")
    assert {check.status for check in judged([host(1), host(2), bare])} == {"ok"}
    assert doctor.failed(judged([host(1), host(2), bare], cpu_config()))
    assert not doctor.failed(judged([host(1), host(2), dataclasses.replace(bare, cpus=0)], cpu_config()))


def test_shared_memory_of_one_host_for_engines_on_others():
    shm = {"sync": {"backend": "shm"}}
    for settings in (config(1, 4, 4, **shm), cpu_config(**shm)):
        assert fault([host(1), host(2)], settings) == (
            "sync.backend: shm reaches engines on the trainer's host alone, but the cluster has 2 hosts; set "
            "sync.backend to auto"
        )
    assert {check.status for check in judged([host(1)], config(1, 4, 4, **shm))} == {"ok"}


def test_an_interface_that_does_not_exist():
    settings = config(cluster={"interface": "eth0"})
    assert {check.status for check in judged([host(1), host(2)], settings)} == {"ok"}
    other = host(2, interfaces={"lo": ["127.0.0.1"], "ens3": ["10.0.0.2"], "eth0": []})
    assert fault([host(1), other], settings).startswith(
        "cluster.interface: eth0 is no interface with an address on every host: 10.0.0.2 has lo, ens3; "
    )
    local = host(2, interfaces={"lo": ["127.0.0.1", "::1"], "eth0": ["fe80::2"]})
    assert "10.0.0.2 has lo; " in fault([host(1), local], settings)
    loopback = config(1, 4, 4, cluster={"interface": "lo"})
    assert "lo is loopback on 10.0.0.1, 10.0.0.2" in fault([host(1), host(2)], loopback)
    assert {check.status for check in judged([host(1)], loopback)} == {"ok"}


@pytest.mark.parametrize(
    ("address", "part"),
    [
        ("127.0.0.1", "127.0.0.1 reaches no other host"),
        ("localhost", "localhost reaches no other host"),
        ("10.0.0.1", "10.0.0.1 is no address of 10.0.0.2"),
        ("::1", "::1 reaches no other host"),
        ("0.0.0.0", None),
        ("::", None),
        ("metrics.internal", None),
        (None, None),
    ],
)
def test_metrics_that_no_other_host_reaches(address, part):
    settings = config(1, 4, 4, metrics={"host": address})
    if part is None:
        assert not doctor.failed(judged([host(1), host(2)], settings))
    else:
        line = fault([host(1), host(2)], settings)
        assert line.startswith(f"metrics.host: {part}")
        assert "set it to null for the address of each host" in line
    assert not doctor.failed(judged([host(1)], settings))


def test_on_cpu_too_few_cores_only_slow_the_run():
    settings, takes = cpu_config(3, 2), {"memory_bytes": 8 * GB, "compiles": True}
    small = [host(1, gpus=0, cpus=2, cores=2), host(2, gpus=0, cpus=2, cores=2)]
    assert warnings(judged(small, settings, **takes)) == [
        "CPUs: 4 CPUs in all (10.0.0.1: 2, 10.0.0.2: 2), but 5 are needed for 3 engines and 2 trainer ranks"
    ]
    wide = cpu_config(engine_threads=3)
    assert fault(small, wide).startswith("cores: no host has 3 cores for an engine (10.0.0.1: 2, 10.0.0.2: 2); ")
    # Ray was started with fewer CPUs than there are: processes share them.
    assert not doctor.failed(judged([dataclasses.replace(each, cores=8) for each in small], wide))
    assert "and at most 64 processes share one; lower" in fault(small, cpu_config(298))
    without = [small[0], dataclasses.replace(small[1], compiler=False)]
    assert "C++ compiler: none on 10.0.0.2" in fault(without, settings, **takes)
    poor = [dataclasses.replace(each, memory_bytes=3 * GB) for each in small]
    assert "memory: 6.0 GB available in all, about 8.0 GB needed" in fault(poor, settings, **takes)
    assert "nccl needs GPUs" in fault(small, config(3, 1, 2, resources={"device": "auto"}), **takes)


def test_weights_need_shared_memory_where_engines_are():
    small = host(2, shm_bytes=GB)
    assert warnings(judged([host(1), small])) == [
        "shared memory: less than the 2.0 GB that weights take are free in /dev/shm of 10.0.0.2: 1.0 GB"
    ]
    assert fault([host(1, shm_bytes=0), small]).startswith("shared memory: less than the 2.0 GB")


def test_the_table_has_a_line_per_host():
    silent = HostReport("10.0.0.2", "10.0.0.2", "node2", gpus=8, fault="no answer within 60 s")
    bare = HostReport("10.0.0.4", "10.0.0.4", "node4", python="3.9.0", code="0.0.1 (0)")
    lines = table(config(), Needs("cuda"), [host(1), silent, host(3), bare], host(1)).splitlines()
    assert " ".join(lines[0].split()) == "host GPUs cores memory /dev/shm Python async_rl room for"
    assert " ".join(lines[1].split()) == "10.0.0.1 8 96 900.0 GB 400.0 GB 3.11.9 0.1.0 (3fa2c1d0) 8 trainer ranks"
    assert " ".join(lines[2].split()) == "10.0.0.2 8 no answer within 60 s"
    assert lines[3].endswith("1 engine")
    assert lines[4].endswith("not used")


def test_a_long_list_is_cut():
    hosts = {f"10.0.1.{number}": 4 for number in range(64)}
    line = placement.misfit(config(), hosts, "GPUs")
    assert line == (
        "no host has 8 GPUs for an engine (" + ", ".join(f"10.0.1.{n}: 4" for n in range(8)) + " and 56 more)"
    )


def test_the_driver_s_host_is_not_the_measure_of_a_run_on_a_cluster(monkeypatch):
    def must_not_be_asked(*_):
        raise AssertionError

    for name in ("available_memory", "free_bytes", "gpu_count", "available_cores"):
        monkeypatch.setattr(probes, name, must_not_be_asked)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    settings = config(resources={"device": "auto"})
    names = {check.name for check in doctor.checks(settings)}
    assert {"python", "runs", "model", "data.train"} <= names
    assert names.isdisjoint({"device", "cores", "memory", "shared memory", "C++ compiler"})
    with pytest.raises(AssertionError):
        doctor.checks(config(cluster={}))
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert {check.name for check in doctor.checks(config(cluster={}))} == names


def test_needs_of_a_run():
    layout = {"rollout": {"replicas": 3, "tensor_parallel_size": 4}, "trainer": {"parallel": {"dp": 2, "tp": 2}}}
    settings = config(**layout)
    assert [(need.what, need.count, need.size) for need in placement.processes(settings)] == [
        ("engine", 3, 4),
        ("trainer rank", 4, 1),
    ]
    found = probes.needs(settings)
    assert (found.device, found.unit, found.compiles) == ("cuda", "GPUs", False)
    threads = {"device": "cpu", "engine_threads": 5, "trainer_threads": 6}
    settings = config(**layout, resources=threads, sync={"backend": "shm"})
    assert [need.size for need in placement.processes(settings)] == [5, 6]
    found = probes.needs(settings)
    assert (found.device, found.unit, found.compiles) == ("cpu", "CPUs", True)
    assert found.memory_bytes > 3 * GB


def test_the_first_fail_of_the_hosts_is_raised_in_one_line():
    few = [host(1, gpus=4), host(2, gpus=4)]
    settings = config(ranks=1)
    with pytest.raises(ResourceError) as caught:
        doctor.require_cluster(settings, few, few[0])
    assert str(caught.value).startswith("GPUs: no host has 8 GPUs for an engine (10.0.0.1: 4, 10.0.0.2: 4); lower ")
    with pytest.raises(ConfigError, match=r"^metrics\.host: 127\.0\.0\.1 reaches no other host"):
        doctor.require_cluster(config(metrics={"host": "127.0.0.1"}), few, few[0])
