from copy import deepcopy

import pytest
import torch
from torch import nn

from effnet_fast.passes.backend import use_backend
from effnet_fast.recipe import make_optimizer
from effnet_fast.rmsprop import FusedRMSprop

OPTIONS = {"lr": 0.05, "alpha": 0.9, "momentum": 0.8, "eps": 0.1, "weight_decay": 0.01}

# Shorter than a vector, no multiple of one, of more than one part, laid out channels_last, empty, and a scalar.
SHAPES = ((1,), (7,), (3, 5), (16411,), (40, 24, 3, 3), (0, 4), ())


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in SHAPES]
    return [nn.Parameter(v.contiguous(memory_format=torch.channels_last) if v.dim() == 4 else v) for v in values]


def take_steps(optimizer: torch.optim.Optimizer, count: int, first: int = 0) -> None:
    """Steps with gradients that the number of the step decides."""
    for number in range(first, first + count):
        generator = torch.Generator().manual_seed(1000 + number)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                grad = torch.randn(parameter.shape, generator=generator)
                parameter.grad = torch.empty_like(parameter).copy_(grad)
        optimizer.step()


def assert_close(parameters: list[nn.Parameter], others: list[nn.Parameter]) -> None:
    for mine, theirs in zip(parameters, others, strict=True):
        # some float32 roundings of values around 1, in each of a few steps
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=2e-6, atol=2e-6)


def test_steps_are_those_of_torch_in_float64() -> None:
    mine, theirs = parameters(), [nn.Parameter(parameter.detach().double()) for parameter in parameters()]
    optimizers = FusedRMSprop(mine, **OPTIONS), torch.optim.RMSprop(theirs, **OPTIONS)
    for optimizer in optimizers:
        take_steps(optimizer, 3)
        optimizer.param_groups[0]["lr"] = 0.01
        take_steps(optimizer, 3, first=3)
    assert_close(mine, theirs)


def test_groups_have_options_of_their_own_and_parameters_without_gradient_stay() -> None:
    mine, theirs = parameters(), parameters()
    for optimizer_type, values in ((FusedRMSprop, mine), (torch.optim.RMSprop, theirs)):
        groups = [{"params": values[:3]}, {"params": values[3:5], "lr": 0.2, "weight_decay": 0.0}]
        take_steps(optimizer_type(groups, **OPTIONS), 2)
    assert_close(mine, theirs)
    assert not torch.equal(mine[4], parameters()[4])
    unused = parameters()
    optimizer = FusedRMSprop(unused, **OPTIONS)
    optimizer.step()
    assert all(map(torch.equal, unused, parameters()))
    assert not optimizer.state_dict()["state"]


@pytest.mark.parametrize("before", [FusedRMSprop, torch.optim.RMSprop])
def test_a_run_of_one_goes_on_in_the_other(before: type[torch.optim.RMSprop]) -> None:
    after = torch.optim.RMSprop if before is FusedRMSprop else FusedRMSprop
    whole = parameters()
    take_steps(torch.optim.RMSprop(whole, **OPTIONS), 4)
    first = parameters()
    optimizer = before(first, **OPTIONS)
    take_steps(optimizer, 2)
    second = deepcopy(first)
    resumed = after(second, **OPTIONS)
    resumed.load_state_dict(optimizer.state_dict())
    take_steps(resumed, 2, first=2)
    assert_close(second, whole)
    assert {float(state["step"]) for state in resumed.state_dict()["state"].values()} == {4.0}


def test_the_number_of_threads_changes_no_bit() -> None:
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(parameters())
            take_steps(FusedRMSprop(results[-1], **OPTIONS), 3)
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, results[0], results[1]))
    assert all(map(torch.equal, results[0], results[2]))


def test_a_closure_computes_gradients_and_its_loss_is_returned() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = FusedRMSprop([parameter], **OPTIONS)

    def closure() -> torch.Tensor:
        loss = parameter.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3
    assert (parameter < 1).all()


def test_what_was_made_of_the_weights_can_see_that_they_changed() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = FusedRMSprop([parameter], **OPTIONS)
    product = (parameter * parameter).sum()
    product.backward(retain_graph=True)
    version = parameter._version
    optimizer.step()
    assert parameter._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_it_is_the_recipes_on_the_cpu_in_float32_unless_the_backend_is_eager() -> None:
    float32, float64 = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1, dtype=torch.float64))
    assert type(make_optimizer(iter([float32]), 0.1)) is FusedRMSprop
    assert type(make_optimizer([float32, float64], 0.1)) is torch.optim.RMSprop
    assert type(make_optimizer([nn.Parameter(torch.ones(1, device="meta"))], 0.1)) is torch.optim.RMSprop
    with use_backend("eager"):
        assert type(make_optimizer([float32], 0.1)) is torch.optim.RMSprop


W = torch.ones(4, 6)
RULE = (0.1, 0.9, 0.9, 0.1, 0.0)
WRONG = [
    (([W], [W], [W], []), "grads, squares, velocities: must be as many as weights"),
    (([W.double()], [W], [W], [W]), "weights: must be float32"),
    (([W], [W.bfloat16()], [W], [W]), "grads: must be float32"),
    (([W], [W[:2]], [W], [W]), "grads: must have the shapes of weights"),
    (([W], [W.T], [W], [W]), "grads: must have the shapes of weights"),
    (([W], [torch.ones(6, 4).T], [W], [W]), "grads: must have the strides of weights"),
    (([W], [W], [torch.ones(24)], [W]), "squares: must have the shapes of weights"),
    (([W], [W], [W], [torch.ones(4, 8)[:, :6]]), "velocities: must have the strides of weights"),
    (([torch.ones(4, 8)[:, :6]],) * 4, "weights: must lie without gaps"),
    (([torch.ones(1, 6).expand(4, 6)],) * 4, "weights: must lie without gaps"),
]


@pytest.mark.parametrize(("tensors", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_arguments_are_named(tensors: tuple[list[torch.Tensor], ...], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.effnet_fast.rmsprop_step(*tensors, *RULE)


def test_the_op_keeps_to_its_schema() -> None:
    values = [[torch.rand(4, 6), torch.rand(3)] for _ in range(4)]
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.effnet_fast.rmsprop_step.default, (*values, *RULE), test_utils=tests)
