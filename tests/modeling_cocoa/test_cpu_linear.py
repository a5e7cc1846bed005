# SPDX-License-Identifier: Apache-2.0
"""Linear layers as convolutions give what linear layers give, and only where nothing else is wanted of them."""

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from modeling_cocoa.cpu_linear import LEAST_ROWS, LinearByConvolution


@pytest.fixture
def convolutions(monkeypatch):
    """Shapes of the inputs of each convolution that is called."""
    shapes, conv2d = [], nn.functional.conv2d

    def counted(inputs, *args):
        shapes.append(tuple(inputs.shape))
        return conv2d(inputs, *args)

    monkeypatch.setattr(nn.functional, "conv2d", counted)
    return shapes


@torch.no_grad()
@given(
    st.sampled_from([(), (1,), (2, 1)]),
    st.integers(1, 2 * LEAST_ROWS),
    st.integers(1, 40),
    st.integers(1, 40),
    st.booleans(),
    st.booleans(),
)
def test_values_and_shapes_are_those_of_the_linear_layer(leading, rows, inner, outer, bias, contiguous):
    layer = nn.Linear(inner, outer, bias)
    inputs = torch.randn(*leading, rows, inner)
    if not contiguous:
        inputs = torch.randn(*leading, inner, rows).transpose(-1, -2)
    expected = layer(inputs)
    with LinearByConvolution():
        found = layer(inputs)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert found.shape == expected.shape
    found.view(-1)  # as attention heads are split off


@torch.no_grad()
def test_many_rows_are_convolved_in_the_thread_that_asks(convolutions):
    layer, many = nn.Linear(4, 3), torch.randn(1, LEAST_ROWS, 4)
    with LinearByConvolution():
        layer(many)
        layer(many[:, 1:])
        thread = threading.Thread(target=layer, args=(many,))
        thread.start()
        thread.join()
    layer(many)
    assert convolutions == [(1, 4, 1, LEAST_ROWS)]


class Weight(nn.Parameter):
    """As quantized and sharded weights are: a class of its own."""


@pytest.mark.parametrize("case", ["gradient", "bfloat16", "autocast", "class"])
def test_what_a_convolution_would_change_is_left_alone(case, convolutions):
    layer, many = nn.Linear(4, 3), torch.randn(LEAST_ROWS, 4)
    if case == "bfloat16":
        layer, many = layer.bfloat16(), many.bfloat16()
    if case == "class":
        layer.weight = Weight(layer.weight.detach())
    with (
        LinearByConvolution(),
        torch.set_grad_enabled(case == "gradient"),
        torch.autocast("cpu", enabled=case == "autocast"),
    ):
        layer(many)
    assert convolutions == []
