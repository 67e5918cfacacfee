"""The two sides of a weight sync as scripts: engines and a trainer that compute nothing, without Ray.

A token's log-prob and its expert are functions of the token. What is scripted: weights that arrive wrong, deaths,
calls that hang or are late.
"""

import asyncio

import numpy as np
from ray.exceptions import ActorDiedError

from async_rl.config.loading import validate
from async_rl.errors import WeightSyncError
from async_rl.models.config import ModelConfig
from async_rl.rollout.engine.interface import Score
from async_rl.weights.buckets import checksum
from async_rl.weights.fingerprint import WIDTH
from async_rl.weights.sync import WeightSync

VOCAB, EXPERTS, LAYERS = 50, 4, 3
MODEL = ModelConfig(
    architecture="Qwen3MoeForCausalLM", vocab_size=VOCAB, hidden_size=8, intermediate_size=8, num_layers=LAYERS,
    num_heads=1, num_kv_heads=1, head_dim=8, rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=256,
    tie_word_embeddings=False, num_experts=EXPERTS, top_k=1, moe_intermediate_size=8, moe_layers=(0, 2),
)  # fmt: skip


class Side:
    """``side.method(...)`` gives something to await, which calls ``do_method`` and is noted in ``calls``."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        if name.startswith("do_"):
            raise AttributeError(name)
        target = getattr(self, f"do_{name}")

        async def method(*arguments, **named):
            self.calls.append(name)
            return target(*arguments, **named)

        return method


class Engine(Side):
    """Log-prob and expert of a token are functions of it; log-probs are off by ``error`` before transfer ``wrong``."""

    def __init__(self, wrong=0, error=1.0, reach=EXPERTS, renumber=0, layer=1):
        super().__init__()
        self.wrong, self.error, self.reach, self.renumber, self.layer = wrong, error, reach, renumber, layer
        self.pushes = 0

    @property
    def off(self):
        return self.error if self.pushes < self.wrong else 0.0

    def do_score(self, sequences):
        return [Score(logprobs(s) + np.float32(self.off), self.routing(s)) for s in sequences]

    def routing(self, sequence):
        experts = (sequence[:-1] % self.reach + self.renumber) % EXPERTS
        return np.repeat(experts[:, None, None], 2, axis=1).astype(np.uint8)

    def do_fingerprints(self, sequences):
        stream = fingerprints(sequences[0])
        stream[self.layer + 1 :] += self.off
        return [stream]

    dead = None  # the call at which its process is found dead
    hangs = None  # the call that it never answers
    owed = None  # what its engine has not answered

    def __getattr__(self, name):
        method = super().__getattr__(name)

        async def answered(*arguments, **named):
            if self.dead in (name, "ever"):
                self.dead = "ever"
                raise ActorDiedError()
            if self.hangs == name:
                self.owed = name
                await asyncio.sleep(3600)
            return await method(*arguments, **named)

        return answered

    def do_pause(self, *, end_calls):
        self.ended_calls = end_calls

    leaves = False  # routed experts with the replica, as it does where they are large

    async def wake_and_score(self, sequences):
        await self.wake()
        scores = await self.score(sequences)
        self.probed = [score.routed_experts for score in scores]
        if not self.leaves:
            return scores
        return [Score(score.logprobs, None, left_behind=checksum(score.routed_experts)) for score in scores]

    def do_probed_routing(self):
        return self.probed

    def do_wake(self): ...
    def do_resume(self): ...

    def do_init(self): ...

    def do_receive(self, update, version):
        self.pushes += 1
        self.version = version

    def do_unanswered(self):
        return self.owed


class Trainer(Side):
    """``sends``: it transfers the weights itself, as with nccl; else each engine takes what was staged."""

    def __init__(self, engine, sends=False):
        super().__init__()
        self.engine, self.sends = engine, sends
        self.workers, self.pushed_to, self.fails, self.staged = [], [], {}, 0

    async def connect(self, replicas):
        self.calls.append("connect")
        self.may_fail("connect")
        self.workers = replicas
        for engine in replicas:
            await engine.init()

    async def stage_weights(self):
        self.calls.append("stage_weights")
        self.may_fail("stage_weights")
        self.staged += 1
        return None if self.sends else [{"round": self.staged}] * len(self.workers)

    async def send_weights(self, version, only):
        self.calls.append("send_weights")
        self.may_fail("send_weights")
        self.pushed_to.append(only)
        for engine in self.workers if only is None else [self.workers[only]]:
            await engine.receive({}, version)

    def may_fail(self, method):
        if self.fails.pop(method, False):
            raise WeightSyncError("a transfer cut in the middle")

    def do_logprobs(self, sequences, routing):
        wrong = 0.0 if routing is None or not self.engine.renumber else 0.7
        return [logprobs(sequence) + np.float32(wrong) for sequence in sequences]

    def do_fingerprints(self, sequences, routing):
        return [fingerprints(sequences[0])]

    def do_native_routing(self, sequences):
        return [np.repeat((s[:-1] % EXPERTS)[:, None, None], 2, axis=1) for s in sequences]


def logprobs(sequence):
    return -(sequence[1:] % 7).astype(np.float32)


def fingerprints(sequence):
    return np.random.default_rng(0).random((LAYERS + 1, len(sequence) - 1, WIDTH)).astype(np.float32)


class Slow(Engine):
    """Answers ``call`` once ``may_answer`` is set."""

    def __init__(self, call):
        super().__init__()
        self.slow, self.may_answer = call, asyncio.Event()

    def __getattr__(self, name):
        method = super().__getattr__(name)
        if name != self.slow:
            return method

        async def late(*arguments, **named):
            await self.may_answer.wait()
            return await method(*arguments, **named)

        return late


async def settled():
    """Let everything happen that can."""
    for _ in range(50):
        await asyncio.sleep(0)


def sync(engine, *, sends=False, **sections):
    tree = {"model": {"path": "m", "dtype": "float32"}, "data": {"train": "d"}, **sections}
    trainer = Trainer(engine, sends)
    subject = WeightSync(validate(tree), MODEL, trainer)
    subject.members = {0: engine}
    return subject, trainer


def fleet(count, **sections):
    """A sync of ``count`` replicas."""
    subject, trainer = sync(Engine(), **sections)
    engines = {replica: Engine() for replica in range(count)}
    subject.members = dict(engines)
    return subject, trainer, engines
