# SPDX-License-Identifier: Apache-2.0
"""The app that shows what a model finds and reconstructs, here and as a Space on the Hub."""
