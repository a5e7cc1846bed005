# SPDX-License-Identifier: Apache-2.0
"""What the Hugging Face Hub says of a README's YAML head when it is asked to validate it."""

from __future__ import annotations

from typing import Any

import yaml
from huggingface_hub import DatasetCard, ModelCard, SpaceCard

CARDS = {"model": ModelCard, "dataset": DatasetCard, "space": SpaceCard}
LICENSES = (
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m "
    "afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 "
    "cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 "
    "cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 "
    "cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 "
    "gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl "
    "apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl "
    "lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 "
    "llama4 grok2-community gemma unknown other array"
).split()
"""The identifiers that the Hub takes, from the error in which it lists them."""


def validate_card(content: str, repo_type: str) -> tuple[list[str], list[str]]:
    """
    Look for errors in a README.

    The real Hub checks more by a schema of its own: the types of all fields, the known pipeline tags, languages and
    libraries, a space's SDK and colours, sizes of datasets, the existence of base models and datasets.

    Args:
        content (`str`): The README.
        repo_type (`str`): `"model"`, `"dataset"` or `"space"`.

    Returns:
        `tuple[list[str], list[str]]`: Errors, for which the Hub refuses it, and warnings.
    """
    try:
        data: dict[str, Any] = CARDS[repo_type](content).data.to_dict()
    except (ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        return [f"Invalid metadata: {error}"], []
    if not data:
        return [], ["empty or missing yaml metadata in repo card"]
    licenses = data.get("license") or []
    unknown = set([licenses] if isinstance(licenses, str) else licenses) - set(LICENSES)
    return ([f'"license" must be one of [{", ".join(LICENSES)}]'] if unknown else []), []
