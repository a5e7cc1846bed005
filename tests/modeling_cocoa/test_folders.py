# SPDX-License-Identifier: Apache-2.0
"""Folders of images: what is listed, what is left out, and vectors in spite of files that cannot be read."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeling_cocoa import folders
from modeling_cocoa.folders import describe_left_out, describe_unreadable, encode_readable, list_images
from modeling_cocoa.inputs import CocoaInputError


def test_a_folder_is_listed_by_the_endings_that_pillow_opens(tmp_path):
    for name in ("b.TIF", "a.png", "c.webp", "d.mp4", "e.txt", "f.txt", "g", "in/h.jfif", "in/i.heic"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (tmp_path / "folder.png").mkdir()
    images, left_out = list_images(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in images] == ["a.png", "b.TIF", "c.webp", "in/h.jfif"]
    assert left_out.startswith("Left out, since Pillow does not open them as images: 2 .txt, ")
    assert {"1 .mp4", "1 no ending", "1 .heic."} <= set(
        left_out.removeprefix(left_out.split(": ")[0] + ": ").split(", ")
    )
    images, left_out = list_images(tmp_path, recursive=False)
    assert [path.name for path in images] == ["a.png", "b.TIF", "c.webp"] and "heic" not in left_out
    assert describe_left_out(iter(())) == ""
    with pytest.raises(NotADirectoryError, match="There is no folder .*nope; check the path"):
        list_images(tmp_path / "nope")


@given(is_bad=st.lists(st.booleans(), max_size=12), chunk=st.integers(1, 5))
def test_whichever_are_bad_the_others_are_embedded(is_bad, chunk):
    calls = []

    def encode(part):
        calls.append(len(part))
        for position, number in enumerate(part):
            if is_bad[number]:
                raise CocoaInputError(f"{number} is corrupt", position)
        return np.array(part, dtype=float).reshape(-1, 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folders, "CHUNK", chunk)
        chunks = list(encode_readable(encode, range(len(is_bad))))
    good = [number for number, bad in enumerate(is_bad) if not bad]
    assert [position for positions, _, _ in chunks for position in positions] == good
    assert [value for _, vectors, _ in chunks for value in vectors[:, 0].tolist()] == good
    reasons = {position: reason for _, _, part in chunks for position, reason in part.items()}
    assert reasons == {number: f"{number} is corrupt" for number, bad in enumerate(is_bad) if bad}
    assert len(chunks) == -(-len(is_bad) // chunk)


def test_an_error_without_a_position_is_raised():
    def encode(part):
        raise CocoaInputError("something else")

    with pytest.raises(CocoaInputError, match="something else"):
        list(encode_readable(encode, [1]))


def test_a_few_reasons_are_given_and_all_are_counted():
    assert describe_unreadable([]) == ""
    said = describe_unreadable([f"{number}.png is corrupt." for number in range(9)])
    assert said.startswith("Left out, since they cannot be read: 9. 0.png is corrupt.") and said.endswith(
        "and 4 more."
    )
