# SPDX-License-Identifier: Apache-2.0
"""MMEB-V1, and the emoji set in its layout: tasks, protocol, metrics, ranking, vectors, reports."""
