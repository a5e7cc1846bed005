# SPDX-License-Identifier: Apache-2.0
"""Retrieval on the embedded emoji set: metrics, untrained baselines, the demo and its page."""
