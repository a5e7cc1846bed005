# SPDX-License-Identifier: Apache-2.0
"""The last layer's MLP computes the EOS tokens alone, where only embeddings are asked for."""

import threading

import pytest
import torch

from modeling_cocoa.last_layer import ROWS, compute_rows, select_rows
from tests.modeling_cocoa.test_modeling import batch_of, rows, with_backend


@pytest.mark.parametrize(("eos_only", "with_gradients"), [(True, False), (False, False), (True, True)])
def test_the_last_layer_multiplies_the_rows_that_are_read(model_type, eos_only, with_gradients):
    model, batch = with_backend(model_type, "sdpa"), batch_of(rows(model_type))
    seen = []
    for layer in model.language_model.layers[-2:]:
        layer.mlp.act_fn.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    with torch.set_grad_enabled(with_gradients):
        model(**batch, eos_only=eos_only)
    tokens = int(batch["attention_mask"].sum())
    assert seen == [tokens, len(batch["input_ids"]) if eos_only and not with_gradients else tokens]


@torch.no_grad()
def test_other_threads_and_what_comes_after_an_error_compute_all():
    layer = torch.nn.Linear(4, 4)
    row = torch.randn(1, 6, 4)
    expected = layer(row)
    select_rows(layer)
    found = []
    with pytest.raises(RuntimeError), compute_rows(torch.tensor([1, 4]), 6):
        some = layer(row)
        thread = threading.Thread(target=lambda: found.append(layer(row)))
        thread.start()
        thread.join()
        raise RuntimeError
    torch.testing.assert_close(some[:, [1, 4]], expected[:, [1, 4]])
    assert (some[:, [0, 2, 3, 5]] == 0).all()
    assert torch.equal(found[0], expected) and torch.equal(layer(row), expected) and ROWS.get() is None
