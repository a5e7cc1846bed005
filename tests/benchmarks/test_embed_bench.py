# SPDX-License-Identifier: Apache-2.0
"""What is compared with `cocoa embed` does the same work."""

from __future__ import annotations

import pytest

from benchmarks import embed
from benchmarks.__main__ import TINY


def test_shards_and_encode_are_measured_on_the_same_inputs(tmp_path):
    for write in (embed.write_texts, embed.write_images):
        source = write(tmp_path, 30)
        job = embed.job_of(str(TINY), source, tmp_path / write.__name__)
        inputs = embed.inputs_of(source)
        assert len(inputs) == 30 == sum(embed.Plan(job.output.folder).rows)
        assert len({str(item) for item in inputs}) == 30


@pytest.mark.parametrize("kind", ["texts", "images"])
def test_the_overhead_is_a_ratio_of_cpu_seconds(kind):
    (row,) = embed.bench_overhead(TINY, 24, 1, kind)["overhead over encode"].values()
    assert row["median ratio"] == row["embed: CPU seconds"] / row["encode: CPU seconds"] > 0.5
