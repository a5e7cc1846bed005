# SPDX-License-Identifier: Apache-2.0
"""What `import trainers` loads: the packages below, and no library that training does not need."""

from __future__ import annotations

import json

from tests.trainers.conftest import run_python

SCRIPT = """
import json, sys
import accelerate, datasets, peft, sentence_transformers, transformers
from sentence_transformers import SentenceTransformerTrainer
from transformers import Trainer
before = set(sys.modules)
import trainers
print(json.dumps(sorted(set(sys.modules) - before)))
"""
NOT_NEEDED = {"cocoa", "gradio", "matplotlib", "rich", "sklearn", "trl", "typer"}


def test_importing_the_trainers_loads_no_demo_and_nothing_for_pushing():
    """The libraries themselves load scikit-learn and rich; only what comes on top of them counts."""
    loaded = json.loads(run_python("-c", SCRIPT).splitlines()[-1])
    assert "trainers.base_trainer" in loaded
    assert not NOT_NEEDED & {name.split(".")[0] for name in loaded}
    assert not {"hub_cards.push", "hub_cards.folder_checks", "evaluation.retrieval"} & set(loaded)
    own = [name for name in loaded if name.split(".")[0] in ("evaluation", "hub_cards", "modeling_cocoa", "trainers")]
    assert len(own) < 90
