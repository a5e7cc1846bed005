# SPDX-License-Identifier: Apache-2.0
"""Digests tell contents apart, and nothing else."""

import copy
import hashlib
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.modules import Pooling

from evaluation.assets import asset_path
from evaluation.digests import digest_content, digest_file, digest_files, fingerprint, weights_digest
from modeling_cocoa.sentence_transformer import CocoaTransformer


def test_bytes_values_and_files_by_their_content(tmp_path):
    (tmp_path / "a").write_bytes(b"[1]")
    expected = hashlib.sha256(b"[1]").hexdigest()
    assert digest_content(b"[1]") == digest_content([1]) == digest_file(tmp_path / "a") == expected
    (tmp_path / "b").write_bytes(b"[1]")
    one, other = (digest_files([tmp_path / name], tmp_path) for name in "ab")
    assert one != other, "names count"
    assert digest_files([tmp_path / "a", tmp_path / "b"], tmp_path) not in (one, other)


def test_a_digest_of_weights_is_of_their_files_alone(tmp_path):
    folder = shutil.copytree(asset_path("checkpoints/cocoa-tiny-bridge"), tmp_path / "model")
    known = weights_digest(folder)
    (folder / "README.md").unlink()
    (folder / "reconstruction.safetensors").unlink()  # of the heads
    assert weights_digest(folder) == known
    weights = load_file(folder / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, folder / "model.safetensors")
    assert weights_digest(folder) != known
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model has no weights"):
        weights_digest(folder)


@pytest.fixture(scope="module")
def module():
    return CocoaTransformer(str(asset_path("checkpoints/cocoa-tiny")))


def test_a_fingerprint_is_of_all_that_decides_the_vectors(module):
    known = fingerprint(module)
    assert known == fingerprint(copy.deepcopy(module)), "and of nothing else"

    def changed(change):
        other = copy.deepcopy(module)
        change(other)
        return fingerprint(other)

    def weight(other):
        with torch.no_grad():
            other.model.language_model.norm.weight[0] += 1e-3

    changes = {
        "weight": weight,
        "dtype": lambda other: other.model.to(torch.bfloat16),
        "length": lambda other: setattr(other.tokenizer, "model_max_length", 9),
        "pixels": lambda other: (
            other.processor.image_processor.size.update(longest_edge=1024)
            if isinstance(other.processor.image_processor.size, dict)
            else setattr(other.processor.image_processor.size, "longest_edge", 1024)
        ),
        "causal": lambda other: setattr(other.model.config.get_text_config(), "is_causal", True),
        "prompt": lambda other: setattr(other.processor, "prompt", "Find it."),
    }
    found = {name: changed(change) for name, change in changes.items()}
    assert len({known, *found.values()}) == len(found) + 1, {name: value == known for name, value in found.items()}


def test_a_fingerprint_of_a_stock_model_sees_pooling_and_sizes():
    path = str(asset_path("checkpoints/cocoa-tiny"))
    known, same, mean, short = (SentenceTransformer(path, device="cpu") for _ in range(4))
    mean[1].pooling_mode = "mean"
    short.max_seq_length = 9
    assert fingerprint(known) == fingerprint(same)
    assert len({fingerprint(known), fingerprint(mean), fingerprint(short)}) == 3


def test_a_fingerprint_of_a_stock_model_sees_all_that_its_modules_save():
    """How they process inputs, how long a vector is, and what is within a router."""
    path = str(asset_path("checkpoints/cocoa-tiny"))
    model = SentenceTransformer(path, device="cpu")
    known = fingerprint(model)
    changes = (
        ("processing_kwargs", {"image": {"do_normalize": False}}),
        ("processing_kwargs", {"text": {"max_length": 4}}),
        ("modality_config", {"text": model[0].modality_config["text"]}),
    )
    found = set()
    for name, value in changes:
        before = getattr(model[0], name)
        setattr(model[0], name, value)
        found.add(fingerprint(model))
        setattr(model[0], name, before)
    model.truncate_dim = 8
    found.add(fingerprint(model))
    model.truncate_dim = None
    assert fingerprint(model) == known and len({known, *found}) == 5

    def routed(*modes):
        routes = {name: [model[0], Pooling(192, pooling_mode=mode)] for name, mode in zip("ab", modes, strict=True)}
        return fingerprint(SentenceTransformer(modules=[Router(routes, default_route="a")], device="cpu"))

    assert len({routed("mean", "cls"), routed("cls", "mean"), routed("cls", "cls")}) == 3
    assert routed("cls", "mean") == routed("cls", "mean")
