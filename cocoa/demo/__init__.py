# SPDX-License-Identifier: Apache-2.0
"""`cocoa demo`: the emoji set searched with an embedded checkpoint."""
