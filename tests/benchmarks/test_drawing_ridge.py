# SPDX-License-Identifier: Apache-2.0
"""What the ridge regression from drawings sees of them."""

import numpy as np
from PIL import Image, ImageDraw

from benchmarks.drawing_ridge import BINS, CELL, COLOURS, SIDE, colours, features, gradients


def drawing(colour, box=(8, 8, 40, 56)):
    image = Image.new("RGB", (SIDE, SIDE), "white")
    ImageDraw.Draw(image).rectangle(box, fill=colour)
    return image


def test_gradients_tell_directions_apart_and_colours_do_not():
    upright = drawing("black", (24, -1, 40, SIDE))  # edges along the height alone: gradients along the width
    blocks = gradients(upright).reshape(-1, BINS, 4)
    assert blocks[:, 0].sum() > 0 and np.allclose(blocks[:, 1:], 0)
    turned = gradients(upright.rotate(90)).reshape(-1, BINS, 4)
    assert turned[:, BINS // 2].sum() > 0 and np.allclose(np.delete(turned, BINS // 2, axis=1), 0)
    assert len(gradients(upright)) == (SIDE // CELL - 1) ** 2 * 4 * BINS


def test_colours_count_what_is_not_white_by_quarter():
    shares = colours(drawing((250, 0, 0), (0, 0, SIDE // 2 - 1, SIDE // 4 - 1))).reshape(4, COLOURS**3 - 1) ** 2
    red = (COLOURS - 1) * COLOURS**2
    assert np.isclose(shares[0, red], 0.5) and np.isclose(shares.sum(), 0.5)


def test_both_parts_have_length_1_on_average():
    rows = features([drawing("red"), drawing("blue", (30, 30, 50, 60)), drawing("green", (2, 2, 9, 60))])
    split = (SIDE // CELL - 1) ** 2 * 4 * BINS
    for part in (rows[:, :split], rows[:, split:]):
        assert np.isclose(np.linalg.norm(part, axis=1).mean(), 1, atol=1e-5)
