"""Which processes of a run share a host, and which cores each of them gets."""

import math
import random
from itertools import product

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from async_rl.config.loading import validate
from async_rl.config.training import ParallelSection
from async_rl.doctor.placement import Load, block_size, filled, plan
from async_rl.driver.core_shares import core_shares
from async_rl.driver.places import Place as ActorPlace
from async_rl.driver.places import Places, bundle_order, needs
from async_rl.runtime.cores import HostCores
from async_rl.trainer.parallel import Place, world_size
from tests.support.examples import examples

GPUS = 8
LAYOUTS = [
    ParallelSection(dp=dp, tp=tp, cp=cp, pp=pp, ep=ep, etp=etp)
    for dp, tp, cp, pp, ep, etp in product((1, 2, 3, 8), (1, 2, 3, 4, 8, 16), (1, 2, 4), (1, 2), (1, 4, 16), (1, 2))
    if (dp * tp * cp) % (ep * etp) == 0
]


def config(replicas=1, parallel=None, engine_gpus=1, parts=1, **resources):
    """The settings of a run whose engines have so many GPUs on each of so many hosts."""
    return validate(
        {
            "model": {"path": "m"},
            "data": {"train": "t"},
            "rollout": {
                "replicas": replicas,
                "tensor_parallel_size": engine_gpus * parts,
                "hosts_per_engine": parts,
            },
            "trainer": {"parallel": parallel or {}},
            "resources": resources,
        }
    )


def gpu_plan(hosts, **settings):
    return plan(config(device="cuda", **settings), [{"CPU": 64.0, "GPU": float(gpus)} for gpus in hosts])


def cpu_plan(hosts, **settings):
    return plan(config(device="cpu", **settings), [{"CPU": float(cores)} for cores in hosts])


def groups(sizes, *coordinates):
    """Return the ranks that differ in these coordinates alone."""
    found = {}
    for rank in range(world_size(sizes)):
        place = Place.of(sizes, rank)
        if coordinates == ("ep", "etp"):  # an expert layer's own way to lay out a stage
            key = place.pp, rank % (sizes.tp * sizes.cp * sizes.dp) // (sizes.ep * sizes.etp)
        else:
            key = tuple(getattr(place, name) for name in {"pp", "dp", "cp", "tp"}.difference(coordinates))
        found.setdefault(key, []).append(rank)
    return found.values()


def within_blocks(found, block):
    return all(len({rank // block for rank in group}) == 1 for group in found)


@pytest.mark.parametrize("pp", [1, 2])
def test_groups_that_fit_a_host_are_within_a_block_and_tensor_parallel_ones_first(pp):
    whole = {"tp": 0, "cp": 0, "ep": 0}
    for sizes in (sizes for sizes in LAYOUTS if sizes.pp == pp):
        block = block_size(sizes, GPUS)
        assert block <= GPUS
        assert (world_size(sizes) // sizes.pp) % block == 0, "a block does not cross a pipeline stage"
        if sizes.tp <= GPUS:
            whole["tp"] += 1
            assert within_blocks(groups(sizes, "tp"), block)
        if math.lcm(sizes.tp * sizes.cp, sizes.etp) <= GPUS:
            whole["cp"] += 1
            assert within_blocks(groups(sizes, "tp", "cp"), block)
        if math.lcm(sizes.tp * sizes.cp, sizes.etp * sizes.ep) <= GPUS:
            whole["ep"] += 1
            assert within_blocks(groups(sizes, "ep", "etp"), block)
    assert min(whole.values()) > 20


@pytest.mark.parametrize(
    ("parallel", "hosts", "block"),
    [
        ({"tp": 16}, 8, 8),  # half a group on each of two hosts
        ({"tp": 4, "cp": 4}, 8, 8),  # two of the four context-parallel parts
        ({"tp": 4, "cp": 4}, 4, 4),
        ({"tp": 3, "cp": 2}, 8, 6),
        ({"tp": 3, "cp": 2}, 4, 3),
        ({"tp": 2, "dp": 8, "ep": 8}, 8, 8),
        ({"dp": 16, "ep": 16}, 8, 8),
        ({"dp": 8}, 8, 1),
    ],
)
def test_a_host_has_as_many_neighbours_as_divide_a_larger_group(parallel, hosts, block):
    assert block_size(ParallelSection(**parallel), hosts) == block


def test_blocks_become_smaller_where_large_ones_leave_no_room():
    parallel = {"tp": 2, "cp": 2, "dp": 2}
    assert gpu_plan([8, 8], parallel=parallel).block == 4
    assert gpu_plan([6, 6], parallel=parallel, replicas=2, engine_gpus=2).block == 4
    assert gpu_plan([3, 3, 3, 3], parallel=parallel).block == 2
    assert gpu_plan([5, 3, 3, 3], parallel=parallel, engine_gpus=1, replicas=5).block == 2


def test_engines_are_whole_and_placed_first_where_the_trainer_would_take_their_host():
    alike = gpu_plan([8, 8, 8], parallel={"tp": 4}, replicas=2, engine_gpus=8)
    assert (alike.per_replica, alike.per_block, alike.trainer_first) == ({"GPU": 8}, {"GPU": 4}, True)
    assert not gpu_plan([8, 4], parallel={"tp": 4}, engine_gpus=8).trainer_first


def test_engines_are_placed_first_where_ranks_would_leave_too_few_gpus_together():
    """Four ranks packed on the first of two alike hosts leave room for one engine there, and for one on the other."""
    found = gpu_plan([6, 6], parallel={"dp": 4}, replicas=2, engine_gpus=4)
    assert (found.fits, found.trainer_first) == (True, False)
    assert found.loads == (Load(1, 2), Load(1, 2))


def test_a_rank_and_an_engine_share_one_gpu_where_the_settings_say_so():
    found = gpu_plan([1], share_gpu=True)
    assert (found.fits, found.per_replica, found.per_block) == (True, {"GPU": 0.5}, {"GPU": 0.5})
    assert not gpu_plan([1]).fits


def test_ranks_take_every_gpu_that_engines_leave_free():
    for gpus, count, replicas in product(range(2, 9), (1, 2, 3), (1, 2, 3, 4)):
        for engine_gpus in range(1, gpus + 1):
            free = gpus * count - replicas * engine_gpus
            if free > 0 and replicas <= gpus // engine_gpus * count:
                found = gpu_plan([gpus] * count, parallel={"dp": free}, replicas=replicas, engine_gpus=engine_gpus)
                assert found.fits
                assert [load.engines * engine_gpus + load.ranks for load in found.loads] == [gpus] * count


def most_room(hosts, replicas, engine_gpus, block, parts=1):
    """The most blocks for which hosts have room beside the engines, of all their distributions; -1 if these have none.

    Tries them all. Parts of one engine are on different hosts, so that a host has at most one of each engine; that is
    all it takes: dealt host by host to one engine after the other, no engine gets two of one host.
    """
    best = -1
    for engines in product(*(range(min(gpus // engine_gpus, replicas) + 1) for gpus in hosts)):
        if sum(engines) == replicas * parts:
            left = (gpus - here * engine_gpus for gpus, here in zip(hosts, engines, strict=True))
            best = max(best, sum(gpus // block for gpus in left))
    return best


SMALL_LAYOUTS = st.builds(dict, dp=st.integers(1, 8), tp=st.integers(1, 3), cp=st.integers(1, 2), pp=st.integers(1, 2))


@given(
    hosts=st.lists(st.integers(0, 9), max_size=5),
    replicas=st.integers(1, 4),
    engine_gpus=st.integers(1, 8),
    parts=st.integers(1, 3),
    parallel=SMALL_LAYOUTS,
)
@hypothesis.settings(max_examples=examples(1000))
def test_on_gpus_everything_is_placed_whenever_that_is_possible(hosts, replicas, engine_gpus, parts, parallel):
    found = gpu_plan(hosts, parallel=parallel, replicas=replicas, engine_gpus=engine_gpus, parts=parts)
    ranks = world_size(ParallelSection(**parallel))
    assert found.fits == (most_room(hosts, replicas, engine_gpus, 1, parts) >= ranks)
    for gpus, load in zip(hosts, found.loads, strict=True):
        assert load.engines * engine_gpus + load.ranks <= gpus
        assert load.ranks % found.block == 0 or not found.fits
    if found.fits:
        assert sum(load.engines for load in found.loads) == replicas * parts
        assert max(load.engines for load in found.loads) <= replicas
        assert sum(load.ranks for load in found.loads) == ranks
        assert most_room(hosts, replicas, engine_gpus, found.block, parts) >= found.blocks


@pytest.mark.parametrize("hosts", [[8], [8, 8], [8, 8, 8], [4, 8], [8, 4, 4], [16, 8]])
def test_blocks_are_as_large_as_any_distribution_allows_where_sizes_are_powers_of_two(hosts):
    tried = 0
    layouts = {"tp": 8}, {"tp": 4, "dp": 2}, {"tp": 2, "cp": 2, "dp": 3}, {"dp": 5}
    for parallel, replicas, engine_gpus in product(layouts, (1, 2, 3), (1, 2, 4, 8)):
        sizes = ParallelSection(**parallel)
        found = gpu_plan(hosts, parallel=parallel, replicas=replicas, engine_gpus=engine_gpus)
        if found.fits:
            tried += 1
            possible = {block_size(sizes, limit) for limit in range(1, max(hosts) + 1)}
            fitting = (b for b in possible if most_room(hosts, replicas, engine_gpus, b) >= world_size(sizes) // b)
            assert found.block == max(fitting)
    assert tried


@pytest.mark.parametrize(("hosts", "block"), [([], 4), ([0, 0], 4), ([2, 2], 2)])
def test_hosts_that_are_too_few_by_now_are_waited_for(hosts, block):
    waiting = gpu_plan(hosts, parallel={"tp": 4, "cp": 2}, engine_gpus=8)
    assert not waiting.fits
    assert waiting.per_replica == {"GPU": 8}
    assert (waiting.block, waiting.blocks) == (block, 8 // block)


def test_on_cpus_a_rank_takes_its_threads_and_all_share_where_cores_are_too_few():
    enough = cpu_plan([4, 4], parallel={"tp": 2}, trainer_threads=2, replicas=2)
    assert (enough.block, enough.per_block, enough.per_replica) == (2, {"CPU": 4}, {"CPU": 1})
    apart = cpu_plan([1, 1, 2], parallel={"tp": 2}, replicas=2)
    assert (apart.block, apart.blocks, apart.per_block) == (2, 1, {"CPU": 2})
    one_each = cpu_plan([1, 1, 1, 1], parallel={"tp": 2}, replicas=2)
    assert (one_each.block, one_each.blocks, one_each.per_block) == (1, 2, {"CPU": 1})
    shared = cpu_plan([2], parallel={"tp": 2}, replicas=3)
    assert (shared.block, shared.per_block, shared.per_replica) == (2, {"CPU": 0.6666}, {"CPU": 0.3333})


def test_blocks_of_one_host_are_neighbours_and_the_same_hosts_give_the_same_ranks():
    hosts = ["b", "a", "b", "c", "a", "c"]
    order = bundle_order(hosts)
    assert [hosts[bundle] for bundle in order] == ["b", "b", "a", "a", "c", "c"]
    assert bundle_order(list(hosts)) == order
    moved = ["b", "d", "b", "c", "d", "c"]  # host a was lost: its bundles are on another
    assert bundle_order(moved) == order


def test_of_engines_that_come_and_go_the_fewest_decide_how_the_trainer_is_cut():
    assert gpu_plan([8], parallel={"tp": 2, "cp": 2}, replicas={"min": 2, "max": 64}, engine_gpus=2).block == 4
    shared = cpu_plan([2], replicas={"min": 1, "max": 64})
    assert (shared.per_block, shared.per_replica) == ({"CPU": 1}, {"CPU": 1})


def test_what_a_group_needs_is_said():
    assert needs([{"GPU": 8.0}]) == "8 GPU on one host"
    assert needs([{"GPU": 4.0}] * 2) == "2 x 4 GPU, each on one host"


def test_two_cores_are_split():
    shares = core_shares(config(), {0: ""}, [""])
    assert shares.engines[0].of([0, 1]) == (0,)
    assert shares.trainers[0].of([0, 1]) == (1,)


@pytest.mark.parametrize(("replicas", "ranks", "engine_threads", "trainer_threads"), [(2, 1, 1, 1), (1, 2, 2, 3)])
def test_no_core_is_given_twice(replicas, ranks, engine_threads, trainer_threads):
    settings = config(engine_threads=engine_threads, trainer_threads=trainer_threads)
    shares = core_shares(settings, dict.fromkeys(range(replicas), ""), [""] * ranks)
    given = [core for share in (*shares.engines.values(), *shares.trainers.values()) for core in share.of(range(3, 16))]
    assert len(given) == len(set(given)) == replicas * engine_threads + ranks * trainer_threads
    assert set(given) <= set(range(3, 16))


def test_cores_are_kept_while_others_come_and_go():
    cores = HostCores()
    for process, count in (("engine 0", 2), ("engine 1", 2), ("rank 0", 3)):
        cores.give(process, "a", count)
    assert [cores.share(process).first for process in ("engine 0", "engine 1", "rank 0")] == [0, 2, 4]
    cores.give("engine 0", "b", 2)
    cores.give("engine 2", "a", 3)
    assert cores.share("engine 2").first == 7, "the gap is too small"
    cores.give("engine 3", "a", 1)
    assert (cores.share("engine 3").first, cores.share("engine 3").needed) == (0, 10)
    cores.give("engine 1", "a", 2)
    assert cores.share("engine 1").first == 2
    cores.keep({"rank 0"})
    cores.give("engine 4", "a", 4)
    assert cores.share("engine 4").first == 0


def test_each_host_has_its_own_cores_and_too_few_of_one_leave_its_processes_to_the_system():
    names, cores = "abcd", {"a": [7, 9, 11], "b": [0, 1], "c": range(8), "d": [4]}
    random.seed(0)
    replicas = {replica: random.choice(names) for replica in range(4)}
    ranks = ["b", "b", "b", "d"]
    shares = core_shares(config(), replicas, ranks)
    for host in names:
        here = [shares.engines[replica] for replica, where in replicas.items() if where == host]
        here += [shares.trainers[rank] for rank, where in enumerate(ranks) if where == host]
        given = [share.of(cores[host]) for share in here]
        if len(here) > len(cores[host]):
            assert set(given) == {None}
        else:
            assert given == [(core,) for core in cores[host][: len(here)]]


@pytest.mark.parametrize("resources", [{"pin_cores": False}, {"device": "cuda"}])
def test_no_core_is_given_where_none_is_wanted_or_gpus_compute(resources):
    shares = core_shares(config(**resources), {0: ""}, [""])
    assert not shares.engines
    assert not shares.trainers


def test_too_few_cores_leave_every_process_to_the_system():
    shares = core_shares(config(), {0: "", 1: ""}, [""])
    assert {share.of([0, 1]) for share in (*shares.engines.values(), *shares.trainers.values())} == {None}


def test_an_engine_over_hosts_reserves_its_share_of_each():
    found = gpu_plan([8, 8, 8, 8], parallel={"dp": 4, "tp": 4}, engine_gpus=8, parts=2)
    assert (found.per_replica, found.loads) == ({"GPU": 8}, (Load(0, 8), Load(0, 8), Load(1, 0), Load(1, 0)))
    assert not gpu_plan([16, 4], parallel={}, engine_gpus=8, parts=2).fits, "two parts on one host"
    assert cpu_plan([2, 2], engine_gpus=1, parts=2).loads == (Load(1, 1), Load(1, 0))
    elastic = config(replicas={"min": 1, "max": 9}, engine_gpus=4, parts=2, device="cuda")
    assert filled(elastic, {"a": 9, "b": 8, "c": 4}) == {"a": Load(2, 1), "b": Load(2, 0), "c": Load(0, 0)}


async def test_a_run_on_one_host_reserves_nothing_and_needs_no_cluster_for_it(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "")
    settings = config(replicas=2, parallel={"dp": 2})
    places, shares = Places(settings), core_shares(settings, {0: "", 1: ""}, ["", ""])
    assert not places.reserved()
    assert await places.of_trainer() == [ActorPlace(shares.trainers[0]), ActorPlace(shares.trainers[1])]
    assert places.of_replica(1) == [ActorPlace(shares.engines[1])]
    places.release()
