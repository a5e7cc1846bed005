# SPDX-License-Identifier: Apache-2.0
"""The checkpoint in a Python that has the libraries and nothing of this project, as whoever downloads it has them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import transformers
from packaging.specifiers import SpecifierSet
from PIL import Image

CHECKPOINT = Path(__file__).parent.parent / "checkpoints" / "cocoa-tiny"
TEXT = "a cat with heart eyes"
SETTINGS = json.loads((CHECKPOINT / "config_sentence_transformers.json").read_text(encoding="utf-8"))
# With an older transformers sentence-transformers refuses the folder, and so does this package; the model alone works.
IS_RECENT = transformers.__version__ in SpecifierSet(SETTINGS["requirements"]["transformers"]["specifier"])
SENTENCE_TRANSFORMERS_LOADERS = ["stock", "remote"] if IS_RECENT else []
STARTS = [
    [0.1148059, -0.0135020, -0.0075082, -0.1348359],
    [-0.0541731, -0.0548035, 0.0679024, 0.0545812],
    [0.0608503, -0.0319819, 0.0607864, -0.0039333],
]
"""The first numbers of each vector, with every version of the libraries. They change only with the weights."""

ALONE = """
import json, sys

sys.path[:] = json.loads(sys.argv[1])
folder, picture, text, *loaders = sys.argv[2:]
try:
    import modeling_cocoa
except ModuleNotFoundError:
    pass
else:
    raise SystemExit(f"the package is there, in {modeling_cocoa.__path__}: this process shows nothing")

import torch
from transformers import AutoModel, AutoProcessor

items = [text, {"image": picture}, {"image": picture, "text": text}]
found = {}
for loader in loaders:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(folder, device="cpu", trust_remote_code=loader == "remote")
    assert type(model.transformers_model).__name__.startswith("Cocoa") == (loader == "remote"), model
    found[loader] = model.encode(items).tolist()

model = AutoModel.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder)
parts = {"image": {"type": "image", "path": picture}, "text": {"type": "text", "text": text}}
found["transformers"] = []
for kinds in (["text"], ["image"], ["image", "text"]):
    messages = [{"role": "user", "content": [parts[kind] for kind in kinds]}]
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        found["transformers"] += model(**inputs).pooler_output.tolist()
assert "modeling_cocoa" not in sys.modules
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    """A picture in colours of its own, of a size that the processor changes."""
    path = tmp_path_factory.mktemp("alone") / "picture.png"
    rows, columns = np.mgrid[:90, :70]
    pixels = np.stack([rows * 2, columns * 3, (rows + columns) % 64 * 4], axis=-1)
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def alone(picture, tmp_path_factory) -> dict:
    """What a process without the package finds: vectors by loader."""
    # Isolated and without `site`, which would put an editable install of the project on the path again.
    # Nor with the remote code that this process has copied, which would hide what the other one copies.
    unwanted = ("modeling_cocoa", "transformers_modules")
    libraries = [path for path in sys.path if not any((Path(path) / name).exists() for name in unwanted)]
    empty = tmp_path_factory.mktemp("empty")
    arguments = [str(CHECKPOINT), str(picture), TEXT, *SENTENCE_TRANSFORMERS_LOADERS]
    caches = {"HF_HOME": str(empty / "hub"), "HF_MODULES_CACHE": str(empty / "modules")}
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-c", ALONE, json.dumps(libraries), *arguments],
        cwd=empty,
        env={**os.environ, **caches},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.skipif(not IS_RECENT, reason="the package needs a newer transformers")
@pytest.mark.parametrize("loader", [*SENTENCE_TRANSFORMERS_LOADERS, "transformers"])
def test_a_loader_gives_the_vectors_of_the_package(alone, picture, loader):
    from modeling_cocoa import CocoaTransformer

    image = str(picture)
    expected = CocoaTransformer(CHECKPOINT).encode([TEXT, {"image": image}, {"image": image, "text": TEXT}])
    np.testing.assert_allclose(alone[loader], expected, atol=1e-5, rtol=0)


def test_the_vectors_are_those_of_every_other_version(alone):
    starts = np.array(alone["transformers"])[:, :4]
    message = f"STARTS of these weights, if they are new:\n{starts.tolist()}"
    np.testing.assert_allclose(starts, STARTS, atol=1e-5, rtol=0, err_msg=message)
