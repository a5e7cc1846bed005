# SPDX-License-Identifier: Apache-2.0
"""MMEB-V1: its tasks, files, protocol, scores and reports."""
