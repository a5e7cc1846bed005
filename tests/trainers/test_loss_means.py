# SPDX-License-Identifier: Apache-2.0
"""Means by name, as the log shows them."""

import torch

from trainers.loss_means import RunningMeans


def test_means_weigh_by_count_and_start_anew():
    means = RunningMeans()
    means.add("text", torch.tensor(6.0), torch.tensor(3))
    means.add("text", 2.0, 1)
    means.add("image", torch.tensor(0.5), 1)
    means.add("never", torch.tensor(0.0), torch.tensor(0))
    assert means.take() == {"image": 0.5, "text": 2.0}
    means.add("text", 1.0, 1)
    assert means.take() == {"text": 1.0}
    assert means.take() == {}
