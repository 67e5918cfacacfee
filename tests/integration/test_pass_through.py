"""What trainer.megatron and trainer.ddp pass on takes effect, and nothing that a setting of ours decides passes."""

import pytest

from async_rl.config.pass_through import DDP, MEGATRON, why_refused
from async_rl.models.config import read_model_config
from tests.support.layouts import config_of, make_groups

pytestmark = pytest.mark.megatron

# What we set and a user may set otherwise: kernels and the pipeline's way to send, which change no result.
ADJUSTABLE = {
    *("apply_rope_fusion", "bias_activation_fusion", "bias_dropout_fusion", "moe_grouped_gemm", "moe_permute_fusion"),
    *("overlap_p2p_comm", "batch_p2p_comm", "deallocate_pipeline_outputs", "overlap_grad_reduce"),
}


def all_settings(config):
    from async_rl.trainer.megatron import arguments

    model = read_model_config(config.model.path)
    of_model = (arguments.transformer_settings(config, model, device) for device in ("cpu", "cuda"))
    return {name for each in (*of_model, arguments.ddp_settings(config, "cuda")) for name in each}


def test_what_we_set_is_refused_or_changes_no_result(ranks, checkpoint):
    config = config_of(checkpoint, {}, trainer__recompute="full", trainer__offload_activations=[])
    given = ranks.call(all_settings, config)
    assert given - set(why_refused(MEGATRON)) - set(why_refused(DDP)) <= ADJUSTABLE


def sent(trainer, groups):
    """Return the elements that each output which this stage has sent holds after the step."""
    outputs = []
    trainer._chunks[0].register_forward_hook(lambda _m, _i, output: outputs.append(output))
    trainer.train_step(groups, version=4, oldest_version=3)
    return [output.numel() for output in outputs]


def test_a_field_of_the_model_takes_effect(ranks, checkpoint):
    """Here: by default, what a pipeline stage has sent is not kept until its backward pass."""
    groups = make_groups(count=2)
    plain, changed = (
        ranks.run(sent, config_of(checkpoint, {"pp": 2}, trainer__megatron=given), groups)[0]
        for given in ({}, {"deallocate_pipeline_outputs": False})
    )
    assert len(plain) == len(changed) > 1
    assert set(plain) == {1}
    assert min(changed) > 1


def buckets(trainer):
    return len(trainer._chunks[0].bucket_groups)


@pytest.mark.slow
def test_a_field_of_the_gradients_takes_effect(ranks, checkpoint):
    plain, changed = (
        ranks.run(buckets, config_of(checkpoint, {"dp": 2}, trainer__ddp=given))[0]
        for given in ({}, {"overlap_grad_reduce": True, "bucket_size": 1000})
    )
    assert plain == 1 < changed
