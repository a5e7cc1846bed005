# SPDX-License-Identifier: Apache-2.0
"""Memory does not grow with the number of photos, neither embedding them nor collating them."""

from __future__ import annotations

import sys

import pytest

from benchmarks.__main__ import TINY
from benchmarks.photos import PHOTOS, SIDES, WAYS, bench_photos


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("photos", "sides", "ways"),
    [((8, 32), (2400, 1800), WAYS[:2]), (PHOTOS, SIDES, WAYS)],
)
def test_four_times_as_many_photos_take_as_much_memory(photos, sides, ways):
    report = bench_photos(TINY, photos, sides, ways)
    assert list(report) == list(ways)
    for way, peaks in report.items():
        growth = peaks[f"{photos[1]} photos"][f"against {photos[0]} photos"]
        assert growth < 1.10, (way, peaks)
