"""What a training step costs, counted on the paper's CIFAR-10 network."""

import pytest
import torch
from torch import nn

import models
import train
from benchmarks.penalty import METHODS, CountProducts, count

# In units of one forward pass; a plain step is 3.  See README.md, "What a step costs".
UNITS = {
    "plain": 3,
    "fd": 7,
    "exact (double backpropagation)": 6,
    "ascent": 5,
}


def operations(name):
    torch.manual_seed(0)
    network = models.build("resnext34", classes=10)
    objective = train.Objective(network, **METHODS[name], norm="l2", h=0.01)
    return count(objective, torch.rand(2, 3, 32, 32), torch.tensor([1, 2]))[0]


@pytest.mark.parametrize("name", UNITS)
def test_a_step_costs_what_the_readme_says(name):
    assert operations(name) / operations("plain") == pytest.approx(UNITS[name] / 3, rel=0.01)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_counter_counts_a_convolution_by_hand(groups):
    conv = nn.Conv2d(4, 6, 3, padding=1, groups=groups, bias=False)
    x = torch.rand(5, 4, 7, 7, requires_grad=True)
    with CountProducts() as forward:
        out = conv(x)
    by_hand = 2 * 5 * 7 * 7 * 6 * (4 // groups) * 9
    assert forward.flops == by_hand
    with CountProducts() as backward:
        out.sum().backward()
    assert backward.flops == 2 * by_hand
    with CountProducts() as input_only:
        torch.autograd.grad(conv(x).sum(), x)
    assert input_only.flops == 2 * by_hand  # one forward and one of the two backward products


def test_the_counter_counts_moved_bytes_by_hand():
    """Every tensor in and out, and no view."""
    x = torch.rand(5, 7)
    with CountProducts() as counter:
        (x.t().relu() + 1).sum()
    assert counter.flops == 0
    assert counter.moved == 4 * (2 * 35 + 2 * 35 + 35 + 1)


def test_the_counter_counts_a_linear_layer_by_hand():
    linear, x = nn.Linear(8, 3), torch.rand(5, 8)
    with CountProducts() as counter:
        linear(x).sum().backward()
    assert counter.flops == 2 * (2 * 5 * 8 * 3)
