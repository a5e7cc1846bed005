# SPDX-License-Identifier: Apache-2.0
"""MMEB-V1 and the embedded emoji set: tasks, protocol, metrics, untrained baselines, reports, the demo."""
