"""The optimizers that Megatron imports. On a CPU the trainer's own takes their place."""

from collections.abc import Iterable

import torch


class FusedAdam(torch.optim.Optimizer):
    """AdamW over float32 parameters; ``step`` is counted per group, as the real one does."""

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter | dict],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        bias_correction=True,
        adam_w_mode=True,
        capturable=False,
        master_weights=False,
        master_weight_dtype=torch.float32,
        exp_avg_dtype=torch.float32,
        exp_avg_sq_dtype=torch.float32,
        use_decoupled_grad=False,
        store_param_remainders=False,
        set_grad_none: bool | None = None,
    ):
        if amsgrad or capturable or master_weights or use_decoupled_grad or not (adam_w_mode and bias_correction):
            raise NotImplementedError("the stand-in's FusedAdam is AdamW over float32 parameters")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None, grad_scaler=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state |= {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
                mean, square = state["exp_avg"], state["exp_avg_sq"]
                mean.lerp_(parameter.grad, 1 - beta1)
                square.mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
                scale = (square / (1 - beta2 ** group["step"])).sqrt_().add_(group["eps"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.addcdiv_(mean / (1 - beta1 ** group["step"]), scale, value=-group["lr"])


class FusedSGD(torch.optim.Optimizer):
    def __init__(self, *_, **__):
        raise NotImplementedError("the stand-in for Transformer Engine has no SGD")


def multi_tensor_applier(op, noop_flag_buffer, tensor_lists, *args):
    return op(2048 * 32, noop_flag_buffer, tensor_lists, *args)


def multi_tensor_scale(chunk_size, noop_flag, tensor_lists, scale):
    sources, targets = tensor_lists
    torch._foreach_copy_(targets, torch._foreach_mul(sources, scale))


def multi_tensor_l2norm(chunk_size, noop_flag, tensor_lists, per_tensor=False):
    (tensors,) = tensor_lists
    norms = torch.stack(torch._foreach_norm(tensors))
    return norms.norm().reshape(1), norms if per_tensor else None
