# SPDX-License-Identifier: Apache-2.0
"""Linear layers on a CPU by oneDNN, which is faster than MKL on AMD's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

LEAST_ROWS = 256
"""With fewer, a convolution is not the faster one."""


class LinearByConvolution(TorchFunctionMode):
    """
    A context in which the linear layers of the current thread compute many rows as a pointwise convolution, on a CPU
    in float32 and without gradient. torch gives matrix products to MKL and convolutions to oneDNN.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Every function of torch passes here."""
        if func is nn.functional.linear and not kwargs and _is_convolved(*args):
            return _convolve(*args)
        return func(*args, **(kwargs or {}))


def _is_convolved(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    return (
        inputs.device.type == "cpu"
        and inputs.dtype == weight.dtype == torch.float32
        and inputs.shape[:-1].numel() >= LEAST_ROWS
        and type(weight) in (nn.Parameter, Tensor)  # neither quantized nor sharded
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
    )


def _convolve(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    # Rows are the width of an image of one line whose channels lie last: none of these views copies.
    image = inputs.reshape(1, 1, -1, inputs.shape[-1]).permute(0, 3, 1, 2)
    output = nn.functional.conv2d(image, weight[:, :, None, None], bias)
    return output.permute(0, 2, 3, 1).contiguous().view(*inputs.shape[:-1], -1)
