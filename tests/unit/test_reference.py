"""The reference's weights are lent to the model without a copy, and the model's own come back."""

import pytest
import torch

from async_rl.trainer.reference import ReferenceWeights


def test_the_model_computes_with_the_reference_and_then_with_its_own_memory_again():
    model = torch.nn.Linear(3, 2)
    first = [parameter.detach().clone() for parameter in model.parameters()]
    reference = ReferenceWeights([model])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1.0  # an update
    parameters = list(model.parameters())
    own = [(parameter.data_ptr(), parameter.detach().clone()) for parameter in parameters]
    lent = []
    for _ in range(2):
        with reference.loaded():
            lent.append([parameter.data_ptr() for parameter in parameters])
            assert all(torch.equal(parameter, value) for parameter, value in zip(parameters, first, strict=True))
    assert lent[0] == lent[1], "on a CPU nothing is copied"
    for parameter, (address, value) in zip(parameters, own, strict=True):
        assert parameter.data_ptr() == address
        assert torch.equal(parameter, value)


def test_the_models_own_weights_come_back_after_an_error():
    model = torch.nn.Linear(3, 2)
    reference, address = ReferenceWeights([model]), model.weight.data_ptr()
    with pytest.raises(RuntimeError, match="failed"), reference.loaded():
        raise RuntimeError("the pass failed")
    assert model.weight.data_ptr() == address
