# SPDX-License-Identifier: Apache-2.0
"""The layers' faster ways compute what the stock ones do."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from modeling_cocoa import layers
from modeling_cocoa.layers import CONVOLUTION_ROWS, Linear, PatchConvolution, multiply


def convolutions(monkeypatch):
    """Rows of each product that runs as a convolution."""
    rows, conv2d = [], nn.functional.conv2d

    def count(image, *args):
        rows.append(image.shape[-1])
        return conv2d(image, *args)

    monkeypatch.setattr(nn.functional, "conv2d", count)
    return rows


needs_both = pytest.mark.skipif(
    not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()), reason="needs MKL and oneDNN"
)


@needs_both
@pytest.mark.parametrize("rows", [1, CONVOLUTION_ROWS - 1, CONVOLUTION_ROWS, 700])
@pytest.mark.parametrize("bias", [True, False])
def test_many_rows_are_multiplied_by_a_convolution(rows, bias, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    linear = Linear(48, 96, bias=bias)
    inputs = torch.randn(rows, 48, generator=generator)
    convolved = convolutions(monkeypatch)
    with torch.no_grad():
        output = linear(inputs)
    assert convolved == ([rows] if rows >= CONVOLUTION_ROWS else [])
    expected = nn.functional.linear(
        inputs.double(), linear.weight.double(), None if not bias else linear.bias.double()
    )
    torch.testing.assert_close(output, expected.float(), atol=1e-5, rtol=1e-5)
    assert output.is_contiguous()


def test_everything_else_is_the_plain_product(monkeypatch):
    """Gradients, other types and shapes, autocast, and weights that are no plain tensors."""
    convolved = convolutions(monkeypatch)
    inputs, weight = torch.randn(CONVOLUTION_ROWS, 16), torch.randn(8, 16)
    trained = nn.Parameter(weight)
    multiply(inputs, trained, None).sum().backward()
    assert trained.grad is not None
    with torch.no_grad():
        assert multiply(inputs.bfloat16(), weight.bfloat16(), None).dtype == torch.bfloat16
        assert multiply(inputs[None], weight, None).shape == (1, CONVOLUTION_ROWS, 8)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert multiply(inputs, weight, None).dtype == torch.bfloat16

        class Quantized(torch.Tensor):
            """Stands for a weight that keeps its numbers in another form."""

        multiply(inputs, weight.as_subclass(Quantized), None)
    assert convolved == []


def test_patches_that_do_not_overlap_are_one_product():
    stock = nn.Conv3d(3, 20, kernel_size=(2, 4, 4), stride=(2, 4, 4), bias=False)
    ours = PatchConvolution(3, 20, kernel_size=(2, 4, 4), stride=(2, 4, 4), bias=False)
    ours.load_state_dict(stock.state_dict())
    patches = torch.randn(CONVOLUTION_ROWS, 3, 2, 4, 4)
    torch.testing.assert_close(ours(patches), stock(patches), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(ours(patches), stock(patches), atol=1e-5, rtol=1e-5)


FAULTS = """
import resource, sys
import torch
from modeling_cocoa.layers import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
faults = []
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(4 * 2**20), torch.ones(4 * 2**20)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(*faults)
"""


@pytest.mark.skipif(sys.platform != "linux" or not sys.maxsize > 2**32, reason="glibc's allocator")
def test_freed_memory_is_used_again():
    """Twice 16 MiB, freed and taken again: 8,192 fresh pages each time, or none once they have been taken."""

    def faults(way: str) -> list[int]:
        result = subprocess.run([sys.executable, "-c", FAULTS, way], capture_output=True, text=True, check=True)
        return [int(number) for number in result.stdout.split()]

    assert min(faults("keep")[1:3]) < 800
    assert max(faults("leave")[1:3]) > 4000, "the system keeps it by itself: keep_freed_memory can go"


@torch.no_grad()
def test_every_gated_mlp_works_in_place_and_like_the_stock_one(backbone):
    gated = [module for module in backbone.modules() if isinstance(module, layers.GatedMLP)]
    assert len(gated) >= len(backbone.language_model.layers)
    for mlp in gated:
        assert isinstance(mlp.act_fn, layers.SILU)
        inputs = torch.randn(5, mlp.gate_proj.in_features)
        before = inputs.clone()
        expected = mlp.down_proj(mlp.act_fn(mlp.gate_proj(inputs)) * mlp.up_proj(inputs))
        torch.testing.assert_close(mlp(inputs), expected)
        assert torch.equal(inputs, before)
