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

    routing: [N-1, L, K] each; the row of the last token, which predicts no token, is invented. The experts are eager
    ones, because the grouped kernel has been seen to be off by 1e-4 on the CPU now and then.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    routers = [module for module in model.modules() if isinstance(module, Qwen3MoeTopKRouter)]
    forced: list[Any] = [None] * len(routers)

    def force(index):
        router = routers[index]

        def forward(hidden):
            hidden = hidden.reshape(-1, router.hidden_dim)
            logits = torch.nn.functional.linear(hidden, router.weight)
            scores = logits.softmax(-1, dtype=torch.float).gather(1, forced[index])
            if router.norm_topk_prob:
                scores = scores / scores.sum(-1, keepdim=True)
            return logits, scores, forced[index]

        router.forward = forward

    for index in range(len(routers)):
        force(index)
    result = []
    for sequence, rows in zip(sequences, routing, strict=True):
        padded = np.concatenate([rows, rows[-1:]]).astype(np.int64)
        for index in range(len(routers)):
            forced[index] = torch.from_numpy(padded[:, index].copy())
        ids = torch.from_numpy(sequence.astype(np.int64))
        with torch.no_grad():
            logprobs = model(ids[None]).logits[0, :-1].log_softmax(-1)
        result.append(logprobs.gather(1, ids[1:, None])[:, 0].numpy())
    return result
