# SPDX-License-Identifier: Apache-2.0
"""A training run as one YAML file: what reads it, what checks it, and the published ones."""
