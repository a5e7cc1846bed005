# SPDX-License-Identifier: Apache-2.0
"""
A device (`--device`, a GPU by default) held against float32 on the CPU; `--device cpu` runs it there in miniature.

Of each precision, a bound is so many times the distance `eps` of 1 and the next number: vectors and gradients that are
right were measured to lose about 2 of them (cosines 2 squares), and what is wrong loses a hundred.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.modeling_cocoa.conftest import image, processor_folder  # noqa: F401  (fixtures)
from tests.trainers.conftest import emoji, model, processor  # noqa: F401  (fixtures)

HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    """Where the tests run."""
    return torch.device(request.config.getoption("device"))


@pytest.fixture
def cuda(device) -> torch.device:
    """The device, of a test that says nothing on a CPU."""
    if device.type == "cpu":
        pytest.skip("says nothing on a CPU")
    return device


@pytest.fixture(scope="session", autouse=True)
def float32_is_float32() -> None:
    """TF32 keeps 11 bits of float32's 24: convolutions have it by default."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def moved(batch: Mapping[str, Any], device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """A batch on a device, its numbers of a precision."""
    return {
        name: value.to(device, dtype if value.is_floating_point() else None) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }


def gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    """By name, copied to the CPU (a module that moves takes its gradients along); of those that have one."""
    return {name: p.grad.to("cpu", copy=True) for name, p in module.named_parameters() if p.grad is not None}


def lost(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Relative error of all gradients, as one vector: norm of the difference by norm of the expected one."""
    assert found.keys() == expected.keys() and expected
    differences = torch.stack([(found[name].double() - value.double()).norm() for name, value in expected.items()])
    return float(differences.norm() / torch.stack([value.double().norm() for value in expected.values()]).norm())


def lost_cosine(found: Any, expected: Any) -> float:
    """1 less the smallest cosine of two rows of unit vectors."""
    found, expected = torch.as_tensor(found).double().cpu(), torch.as_tensor(expected).double().cpu()
    assert found.shape == expected.shape and bool(found.isfinite().all())
    return float(1 - torch.nn.functional.cosine_similarity(found, expected).min())
