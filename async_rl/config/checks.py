"""Combinations of settings that cannot work, or of which one would silently do nothing.

Judged without looking at the machine or the model; ``doctor`` and ``models`` judge by those. Knows only the
tree that it is given; what concerns prompts, rewards and evaluation is in ``input_checks``, agents are in
``agent_checks``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from async_rl.config.agent_checks import check_agents
from async_rl.config.input_checks import check_inputs
from async_rl.config.memory_checks import check_memory
from async_rl.config.pass_through import check_pass_through

if TYPE_CHECKING:
    from async_rl.config.rollouts import RolloutSection
    from async_rl.config.schema import RunConfig


def check_combinations(config: RunConfig) -> None:
    """Raise ValueError for settings that contradict each other, naming them, their values and what to set."""
    check_inputs(config)
    check_agents(config)
    _check_queue(config)
    _check_sync(config)
    _check_engines(config)
    _check_rollout(config)
    _check_cluster(config)
    _check_recovery(config)
    _check_watchdog(config)
    _check_replay(config)
    _check_schedule(config)
    _check_loss(config)
    _check_parallel(config)
    check_memory(config)
    check_pass_through(config)


def _check_queue(config: RunConfig) -> None:
    queue, required = config.queue, config.required_groups
    if queue.max_groups is not None and queue.max_groups < required:
        raise ValueError(
            f"queue.max_groups is {queue.max_groups}, but a training step needs {required} groups at once "
            f"(trainer.groups_per_step x async_training.require_batches); set it to at least {required}"
        )
    if queue.copies > 1 and queue.backend == "redis":
        raise ValueError(
            f"queue.copies is {queue.copies}, but queue.backend is redis, whose server has every group, and its copies "
            "if it is set up so; set queue.copies to 1"
        )
    if queue.redis.ca_file is not None and not queue.redis.url.startswith("rediss://"):
        raise ValueError(
            f"queue.redis.ca_file is set, but queue.redis.url ({queue.redis.url}) does not use TLS; start it with "
            "rediss://"
        )


def _check_engines(config: RunConfig) -> None:
    rollout = config.rollout
    if rollout.engines and rollout.engine != "vllm":
        raise ValueError(
            f"rollout.engine is {rollout.engine}, and rollout.engines is {rollout.engines}; remove one of them"
        )
    if len(rollout.engines) > rollout.replica_range.min:
        raise ValueError(
            f"rollout.engines names {len(rollout.engines)} engines, but the run starts with "
            f"{rollout.replica_range.min} replicas; set rollout.replicas to at least {len(rollout.engines)}"
        )
    _check_quantization(config)
    _check_parallel_engines(config)
    if "sglang" not in rollout.engine_names:
        if rollout.sglang.python is not None:
            raise ValueError(
                f"rollout.sglang.python is {rollout.sglang.python}, but the engine is {rollout.engine_names[0]}; "
                "set rollout.engine to sglang, or remove it"
            )
        return
    if config.sync.backend == "nccl" and len(rollout.engine_names) > 1:
        raise ValueError(
            f"sync.backend is nccl, but rollout.engines is {rollout.engines}, and SGLang's engines meet the trainer in "
            "another kind of group than the others; set sync.backend to auto, shm or object_store, or have one engine"
        )


def _check_parallel_engines(config: RunConfig) -> None:
    rollout = config.rollout
    if (copies := rollout.data_parallel_size) > 1:
        if rollout.engine_names != ("vllm",):
            raise ValueError(
                f"rollout.data_parallel_size is {copies}, but {rollout.engine_setting} has "
                f"{', '.join(rollout.engine_names)}, of which only vllm has such engines; set it to 1, or have vllm "
                "alone"
            )
        if rollout.hosts_per_engine > 1:
            raise ValueError(
                f"rollout.data_parallel_size is {copies}, but rollout.hosts_per_engine is {rollout.hosts_per_engine}; "
                "an engine over several hosts has tensor parallelism alone: set one of them to 1"
            )
    if (hosts := rollout.hosts_per_engine) == 1:
        return
    if rollout.tensor_parallel_size % hosts:
        raise ValueError(
            f"rollout.tensor_parallel_size is {rollout.tensor_parallel_size}, which {hosts} hosts "
            "(rollout.hosts_per_engine) cannot share; an engine has as many GPUs on each of its hosts"
        )
    if rollout.engine_names != ("vllm",):
        raise ValueError(
            f"rollout.hosts_per_engine is {hosts}, but {rollout.engine_setting} has {', '.join(rollout.engine_names)}, "
            "of which only vllm spans hosts; set it to 1, or have vllm alone"
        )
    if config.sync.backend == "shm":
        raise ValueError(
            f"rollout.hosts_per_engine is {hosts}, but sync.backend is shm, which reaches one host; set it to auto"
        )


def _check_quantization(config: RunConfig) -> None:
    rollout = config.rollout
    for key in ("quantization", "kv_cache_dtype"):
        if (value := getattr(rollout, key)) is None:
            continue
        if "sglang" in rollout.engine_names:
            raise ValueError(
                f"rollout.{key} is {value}, but {rollout.engine_setting} has sglang, whose engines keep what the "
                "trainer sends; remove it, or have vllm alone"
            )
        if config.engine_dtype == "float32":
            name = "model.dtype" if rollout.dtype is None else "rollout.dtype"
            raise ValueError(
                f"rollout.{key} is {value}, but the engines compute in float32 ({name}), which vLLM's kernels for fp8 "
                "do not take; set rollout.dtype to bfloat16"
            )


def _check_sync(config: RunConfig) -> None:
    if config.sync.delta.full_every > 1 and config.sync.backend in ("shm", "nccl"):
        raise ValueError(
            f"sync.delta.full_every is {config.sync.delta.full_every}, but sync.backend is {config.sync.backend}, "
            "which transfers all weights each time; set sync.backend to auto or object_store, or sync.delta.full_every "
            "to 1"
        )
    if config.sync.backend != "nccl":
        if config.sync.senders != "one":
            raise ValueError(
                f"sync.senders is {config.sync.senders}, but sync.backend is {config.sync.backend}, with which rank 0 "
                "alone sends; set sync.senders to one, or sync.backend to nccl"
            )
        return
    if config.resources.device == "cpu":
        raise ValueError(
            "sync.backend is nccl, which needs GPUs, but resources.device is cpu; set sync.backend to auto"
        )
    if config.sync.rolling:
        raise ValueError(
            "sync.rolling is true, but sync.backend is nccl, whose broadcast reaches every engine at once; set "
            "sync.rolling to false"
        )


def _check_rollout(config: RunConfig) -> None:
    rollout, size = config.rollout, config.rollout.min_group_size
    if rollout.top_p < 1:
        raise ValueError(
            f"rollout.top_p is {rollout.top_p}: the engine's log-probs would be of the nucleus, but the trainer's "
            "are of the whole vocabulary, so no importance ratio would be right; set rollout.top_p to 1, and lower "
            "rollout.temperature for less random responses"
        )
    _check_distribution(rollout)
    if rollout.max_num_batched_tokens < rollout.max_num_seqs:
        raise ValueError(
            f"rollout.max_num_batched_tokens is {rollout.max_num_batched_tokens}, less than rollout.max_num_seqs "
            f"({rollout.max_num_seqs}), but an engine step decodes one token of each sequence; set it to at least "
            f"{rollout.max_num_seqs}"
        )
    if rollout.trajectory_limit < rollout.max_num_seqs:
        raise ValueError(
            f"rollout.max_trajectories is {rollout.max_trajectories}, less than rollout.max_num_seqs "
            f"({rollout.max_num_seqs}), so the engine would never be full; set it to at least {rollout.max_num_seqs}, "
            "or lower rollout.max_num_seqs"
        )
    _check_single(config)
    bounds, rest = rollout.filter.mean_reward, rollout.filter.rest_epochs
    if rest and not rollout.filter.active:
        raise ValueError(
            f"rollout.filter.rest_epochs is {rest}, but no group is filtered, so that no row would rest; set "
            "rollout.filter.zero_variance or another filter, or rest_epochs to 0"
        )
    if bounds is not None and bounds[0] > bounds[1]:
        raise ValueError(
            f"rollout.filter.mean_reward is [{bounds[0]:g}, {bounds[1]:g}], whose lowest value is above the highest: "
            "every group would be filtered; swap the two values"
        )
    if size is not None and size > rollout.n:
        raise ValueError(
            f"rollout.min_group_size is {size}, more than rollout.n ({rollout.n}); set it to at most {rollout.n}"
        )


def _check_single(config: RunConfig) -> None:
    """Raise ValueError where groups of one response would teach nothing, because there is no other to compare with."""
    if config.rollout.n > 1:
        return
    advantage = config.trainer.loss.advantage
    if advantage in ("grpo", "rloo"):
        raise ValueError(
            f"rollout.n is 1, but trainer.loss.advantage is {advantage}, which compares the responses of a group, and "
            "every advantage would be 0; set rollout.n to at least 2, or the advantage to reinforce_plus_plus or a "
            "function of your own"
        )
    if config.rollout.filter.zero_variance:
        raise ValueError(
            "rollout.n is 1, but rollout.filter.zero_variance is true, which would filter every group, because the "
            "rewards of one response are all equal; set it to false, or rollout.n to at least 2"
        )


def _check_distribution(rollout: RolloutSection) -> None:
    """Raise ValueError for what makes the sampled distribution another one than the model's at a temperature.

    Behaviour log-probs are those of the distribution that was sampled from, and the trainer computes the model's.
    """
    for key, neutral, why in (
        ("top_k", 0, "only the likeliest tokens would be sampled"),
        ("min_p", 0.0, "unlikely tokens would not be sampled"),
        ("presence_penalty", 0.0, "tokens that a response has would become less likely"),
        ("frequency_penalty", 0.0, "tokens that a response has would become less likely"),
        ("repetition_penalty", 1.0, "tokens that prompt or response have would become less likely"),
    ):
        value = getattr(rollout, key)
        if value != neutral and not (key == "top_k" and value == -1):
            raise ValueError(
                f"rollout.{key} is {value}: {why}, but the trainer's log-probs are those of the model, so no "
                f"importance ratio would be right; set rollout.{key} to {neutral}, and lower rollout.temperature for "
                "less random responses"
            )
    if rollout.min_tokens:
        raise ValueError(
            f"rollout.min_tokens is {rollout.min_tokens}: stop tokens would have no probability before it, but in the "
            "trainer's log-probs they have theirs, so no importance ratio of these tokens would be right; set "
            "rollout.min_tokens to 0, and have the reward score short responses lower"
        )


def _check_cluster(config: RunConfig) -> None:
    cluster = config.cluster
    if cluster.shared_fs and cluster.local_dir is not None:
        raise ValueError(
            f"cluster.local_dir is {cluster.local_dir}, but cluster.shared_fs is true, so that every process writes to "
            "the run folder itself; set cluster.shared_fs to false, or cluster.local_dir to null"
        )


def _check_recovery(config: RunConfig) -> None:
    """Raise ValueError where a run would start with fewer replicas than it may continue with."""
    needed, replicas = config.recovery.min_replicas, config.rollout.replica_range
    if replicas.min > replicas.max:
        raise ValueError(
            f"rollout.replicas.min is {replicas.min}, more than rollout.replicas.max ({replicas.max}); set min to "
            f"{replicas.max} at most, or raise max"
        )
    if needed is not None and needed > replicas.min:
        key = "rollout.replicas.min" if config.rollout.elastic else "rollout.replicas"
        raise ValueError(
            f"recovery.min_replicas is {needed}, but {key} is {replicas.min}; set it to {replicas.min} at most"
        )


def _check_watchdog(config: RunConfig) -> None:
    watchdog = config.watchdog
    if watchdog.abort_s < watchdog.stall_s:
        raise ValueError(
            f"watchdog.abort_s ({watchdog.abort_s:g}) is less than watchdog.stall_s ({watchdog.stall_s:g}); "
            f"set it to at least {watchdog.stall_s:g}"
        )


def _check_schedule(config: RunConfig) -> None:
    optimizer = config.trainer.optimizer
    if optimizer.schedule == "constant":
        if optimizer.decay_steps is not None:
            raise ValueError(
                f"trainer.optimizer.decay_steps is {optimizer.decay_steps}, but trainer.optimizer.schedule is "
                "constant; set the schedule to linear or cosine, or remove decay_steps"
            )
        return
    if optimizer.decay_steps is None or optimizer.decay_steps <= optimizer.warmup_steps:
        raise ValueError(
            f"trainer.optimizer.schedule is {optimizer.schedule}, but decay_steps is {optimizer.decay_steps}; set "
            f"it above warmup_steps ({optimizer.warmup_steps}), for example to the run's optimizer steps, "
            f"{config.trainer.steps * config.async_training.require_batches}"
        )
    if optimizer.min_lr > optimizer.lr:
        raise ValueError(
            f"trainer.optimizer.min_lr ({optimizer.min_lr}) is above lr ({optimizer.lr}), but the learning rate falls "
            f"from lr to min_lr; set min_lr to at most {optimizer.lr}"
        )


def _check_loss(config: RunConfig) -> None:
    loss = config.trainer.loss
    if (loss.kl != "none") != (loss.kl_coef > 0):
        raise ValueError(
            f"trainer.loss.kl is {loss.kl}, but kl_coef is {loss.kl_coef}: one without the other does nothing; set "
            "kl to k3 and kl_coef above 0, or kl to none and kl_coef to 0"
        )
    if loss.turn_discount != 1 and loss.advantage != "turn_return":
        raise ValueError(
            f"trainer.loss.turn_discount is {loss.turn_discount:g}, but trainer.loss.advantage is {loss.advantage}, "
            "which has no rewards of turns; set advantage to turn_return, or turn_discount to 1"
        )
    if loss.policy == "reinforce" and loss.proximal != "behaviour":
        raise ValueError(
            f"trainer.loss.proximal is {loss.proximal}, but trainer.loss.policy is reinforce, which has no ratio and "
            "takes its importance weights from the current policy, so proximal would be ignored; set it to behaviour"
        )
    if loss.dual_clip is not None and loss.policy in ("cispo", "dppo", "ipo", "reinforce"):
        raise ValueError(
            f"trainer.loss.dual_clip is {loss.dual_clip}, but trainer.loss.policy is {loss.policy}, whose loss it "
            "does not bound; set dual_clip to null, or policy to ppo or gspo"
        )
    if config.trainer.skip_zero_advantage and (loss.kl != "none" or ":" in loss.policy):
        raise ValueError(
            f"trainer.skip_zero_advantage is true, but a token without an advantage may have a gradient with "
            f"trainer.loss.kl {loss.kl} and policy {loss.policy}; set skip_zero_advantage to false, or kl to none and "
            "policy to a built-in one"
        )
    _check_divergence(config)
    _check_importance(config)
    _check_rejection(config)


def _check_divergence(config: RunConfig) -> None:
    """Raise ValueError where the bound of dppo and ipo would do nothing, or ipo would not be what its name says."""
    loss = config.trainer.loss
    if loss.policy == "ipo" and loss.proximal != "behaviour":
        raise ValueError(
            f"trainer.loss.proximal is {loss.proximal}, but trainer.loss.policy is ipo, which compares the current "
            "with the behaviour policy; set proximal to behaviour, or policy to dppo"
        )
    if ":" in loss.policy:
        return
    if loss.divergence_bound is not None and loss.policy not in ("dppo", "ipo"):
        raise ValueError(
            f"trainer.loss.divergence_bound is {loss.divergence_bound}, but trainer.loss.policy is {loss.policy}, "
            "which has no such bound; set divergence_bound to null, or policy to dppo or ipo"
        )
    if loss.divergence == "kl" and loss.policy != "dppo":
        raise ValueError(
            f"trainer.loss.divergence is kl, but trainer.loss.policy is {loss.policy}, which has no choice of it; set "
            "divergence to tv, or policy to dppo"
        )


def _check_importance(config: RunConfig) -> None:
    loss, importance = config.trainer.loss, config.trainer.loss.importance
    if importance.level != "off" and loss.proximal == "behaviour" and loss.policy != "reinforce":
        raise ValueError(
            f"trainer.loss.importance.level is {importance.level}, but trainer.loss.proximal is behaviour: "
            "the ratio then holds the whole difference, and every weight is 1; set proximal to recompute or "
            "interpolate, or importance.level to off"
        )
    if importance.mode == "mask" and importance.low > importance.high:
        raise ValueError(
            f"trainer.loss.importance.low ({importance.low}) is above importance.high ({importance.high}): "
            "no token would pass; swap the two values"
        )
    exact = config.async_training.partial_rollout.routing == "exact"
    if exact and (loss.policy == "gspo" or importance.level == "sequence"):
        raise ValueError(
            "async_training.partial_rollout.routing is exact, which trains a response in pieces, but trainer.loss "
            f"(policy {loss.policy}, importance.level {importance.level}) needs whole sequences; set routing "
            "to replace, or trainer.loss.policy and importance.level to values that work token by token"
        )


def _check_rejection(config: RunConfig) -> None:
    loss, rejection = config.trainer.loss, config.trainer.loss.rejection
    if rejection.low > rejection.high:
        raise ValueError(
            f"trainer.loss.rejection.low ({rejection.low}) is above rejection.high ({rejection.high}): no sequence "
            "would pass; swap the two values"
        )
    if rejection.bound is not None and rejection.rule not in ("k3", "second_moment"):
        raise ValueError(
            f"trainer.loss.rejection.bound is {rejection.bound}, but rejection.rule is {rejection.rule}, which has no "
            "such bound; set bound to null, or rule to k3 or second_moment"
        )
    if rejection.rule == "second_moment" and loss.proximal != "recompute":
        raise ValueError(
            f"trainer.loss.rejection.rule is second_moment, but trainer.loss.proximal is {loss.proximal}: which tokens "
            "are left out must be known for the whole mini-batch before any gradient; set proximal to recompute"
        )
    exact = config.async_training.partial_rollout.routing == "exact"
    if exact and rejection.rule in ("geometric_mean", "k3"):
        raise ValueError(
            "async_training.partial_rollout.routing is exact, which trains a response in pieces, but "
            f"trainer.loss.rejection.rule is {rejection.rule}, which judges whole sequences; set routing to replace, "
            "or rejection.rule to off"
        )


def _check_parallel(config: RunConfig) -> None:
    """Raise ValueError for a layout that no model could have; ``models`` judges it by the model."""
    sizes = config.trainer.parallel
    dense, experts = sizes.dp * sizes.tp * sizes.cp, sizes.ep * sizes.etp
    if dense % experts:
        raise ValueError(
            f"trainer.parallel: ep x etp is {experts}, which does not divide dp x tp x cp ({dense}), the ranks of "
            "a pipeline stage, over which the experts are distributed; change one of them"
        )
    counts, stages = sizes.layers_per_stage, sizes.pp * sizes.vpp
    if counts is not None and len(counts) != stages:
        raise ValueError(
            f"trainer.parallel.layers_per_stage has {len(counts)} numbers, but there are {stages} stages (pp x vpp); "
            f"give {stages} numbers, or set it to null"
        )
    if sizes.vpp > 1 and sizes.pp == 1:
        raise ValueError(
            f"trainer.parallel.vpp is {sizes.vpp}, but pp is 1, and virtual stages need a pipeline; set vpp to 1, or "
            "pp to at least 2"
        )


def _check_replay(config: RunConfig) -> None:
    """Raise ValueError for settings under which replay would silently do nothing, or not what its name says."""
    replay, partial = config.trainer.router_replay, config.async_training.partial_rollout
    if replay == "R3" and not config.rollout.return_routed_experts:
        raise ValueError(
            "trainer.router_replay is R3, which replays the experts that the engine chose, but "
            "rollout.return_routed_experts is false; set it to true, or trainer.router_replay to R2 or off"
        )
    if replay != "off" and config.trainer.router_fusion:
        raise ValueError(
            f"trainer.router_replay is {replay}, but trainer.router_fusion is true, and the fused router ignores "
            "replay; set trainer.router_fusion to false, or trainer.router_replay to off"
        )
    if partial.routing == "exact" and replay != "R3":
        raise ValueError(
            f"async_training.partial_rollout.routing is exact, but trainer.router_replay is {replay}: the routed "
            "experts of each call are kept for replay, which only R3 does; set trainer.router_replay to R3, or "
            "async_training.partial_rollout.routing to replace"
        )
    if partial.routing == "exact" and partial.mode == "in_flight":
        raise ValueError(
            "async_training.partial_rollout.routing is exact, but its mode is in_flight: a generation that continues "
            "on the KV cache of older weights has no context that could be trained exactly; set mode to resume, "
            "or routing to replace"
        )
