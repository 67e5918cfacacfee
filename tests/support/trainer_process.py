"""Computes with Megatron and with transformers, in a process of its own, for tests that hold an engine.

Megatron's state is global and its patches for the CPU reach into torch, so the test process does not load it. One
trainer is open at a time.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.support.engine_checkpoint import engine_config

_trainer: Any = None


def open_trainer(folder, temperature=1.0, dtype="float32", **trainer_settings):
    """Open a Trainer on the checkpoint of ``folder``, with the settings of ``engine_config`` but for those given."""
    global _trainer
    import torch

    from async_rl.trainer.trainer import Trainer

    torch.set_num_threads(1)
    config = engine_config(folder)
    config = config.model_copy(
        update={
            "model": config.model.model_copy(update={"dtype": dtype}),
            "rollout": config.rollout.model_copy(update={"temperature": temperature}),
            "trainer": config.trainer.model_copy(update=trainer_settings),
        }
    )
    close_trainer()
    _trainer = Trainer(config)


def close_trainer():
    global _trainer
    if _trainer is not None:
        _trainer.close()
        _trainer = None


def ask(method, *arguments, **keywords):
    """Call a method of the open trainer."""
    return getattr(_trainer, method)(*arguments, **keywords)


def train_once(folder, groups, **settings):
    """Return the StepReport of one update on the checkpoint's weights, with all tokens of version 0.

    ``settings`` are those of ``open_trainer``.
    """
    open_trainer(folder, **settings)
    try:
        return ask("train_step", groups, version=0, oldest_version=0)
    finally:
        close_trainer()


def oracle_logprobs(folder, sequences, routing):
    """Return log-probs float32[N-1] of each sequence by transformers in float32, with the experts of ``routing``.

    routing: [N-1, L, K] each.
    """
    calls = [(ids, rows, [(folder, len(rows))]) for ids, rows in zip(sequences, routing, strict=True)]
    return [logprobs for logprobs, _ in oracle_calls(calls)]


def oracle_calls(calls):
    """Compute engine calls (token ids int32[N], experts [N-1, L, K], parts) by transformers in float32.

    parts: (folder, stop) of each stretch of a call between two pushes; the positions up to ``stop`` are computed with
    the weights of ``folder``, and attend to what the stretches before have left in the cache. Returns of each call
    log-probs float32[N-1], and float32[N-1] how far its experts are from the routers' own choice: by how much, in the
    worst layer, the router scores one that it would choose above one that it was given. 0 where they are the same.
    """
    models: dict[Any, _Oracle] = {}
    result = []
    for ids, rows, parts in calls:
        start, cache, found = 0, None, []
        for folder, stop in parts:
            if folder not in models:
                models[folder] = _Oracle(folder)
            logprobs, regret, cache = models[folder].run(ids, rows, start, stop, cache)
            found.append((logprobs, regret))
            start = stop
        result.append(tuple(map(np.concatenate, zip(*found, strict=True))))
    return result


class _Oracle:
    """A model of transformers whose routers take the experts that they are given.

    The experts are eager ones, because the grouped kernel has been seen to be off by 1e-4 on the CPU now and then.
    """

    def __init__(self, folder):
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

        torch.set_num_threads(1)
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, experts_implementation="eager"
        ).eval()
        self.given: list[Any] = []
        self.regret: list[Any] = []
        for layer, router in enumerate(m for m in self.model.modules() if isinstance(m, Qwen3MoeTopKRouter)):
            router.forward = self._forward(router, layer)

    def _forward(self, router, layer):
        def forward(hidden):
            import torch

            given = self.given[layer]
            logits = torch.nn.functional.linear(hidden.reshape(-1, router.hidden_dim), router.weight)
            self.regret.append(logits.topk(router.top_k).values[:, -1] - logits.gather(1, given).min(-1).values)
            scores = logits.softmax(-1, dtype=torch.float).gather(1, given)
            if router.norm_topk_prob:
                scores = scores / scores.sum(-1, keepdim=True)
            return logits, scores, given

        return forward

    def run(self, ids, rows, start, stop, cache):
        """Return log-probs and regret float32[stop-start], and the cache with these positions."""
        import torch

        part = torch.from_numpy(rows[start:stop].astype(np.int64))
        self.given, self.regret = [part[:, layer].contiguous() for layer in range(part.shape[1])], []
        tokens = torch.from_numpy(ids.astype(np.int64))
        with torch.no_grad():
            output = self.model(tokens[None, start:stop], past_key_values=cache, use_cache=True)
        logprobs = output.logits[0].log_softmax(-1).gather(1, tokens[start + 1 : stop + 1, None])[:, 0]
        regret = torch.stack(self.regret).max(0).values
        return logprobs.numpy(), regret.numpy(), output.past_key_values
