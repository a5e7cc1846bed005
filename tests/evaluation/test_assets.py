# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from evaluation import assets


def test_a_checkout_has_its_assets_beside_the_packages():
    data = assets.asset_path("data/emoji.parquet")
    assert data.is_file() and (data.parent / "NOTICE").is_file()


def test_an_installed_package_carries_them_inside(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "emoji.parquet").write_bytes(b"")
    monkeypatch.setattr(assets, "INSTALLED", tmp_path)
    assert assets.asset_path("data/emoji.parquet") == tmp_path / "data" / "emoji.parquet"


def test_a_missing_asset_is_named_with_the_place_and_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(assets, "INSTALLED", tmp_path)
    with pytest.raises(FileNotFoundError, match=f"checkpoints/none is not in {tmp_path}; install"):
        assets.asset_path("checkpoints/none")


def test_a_recipes_file_is_the_users_own_or_the_projects_or_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.parquet").write_bytes(b"")
    assert assets.find_file("mine.parquet").is_file()
    assert assets.find_file("data/emoji.parquet") == assets.asset_path("data/emoji.parquet")
    with pytest.raises(
        FileNotFoundError, match=f"no file yours.parquet, neither from {tmp_path} .*path in the recipe"
    ):
        assets.find_file("yours.parquet")
