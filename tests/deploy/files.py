# SPDX-License-Identifier: Apache-2.0
"""Artifacts taken apart and put together again, with right checksums, as docs/artifact.md says."""

import hashlib
import json

from harprune.deploy.artifact import ALIGNMENT, MAGIC

PREAMBLE = 88


def taken_apart(content: bytes) -> tuple[dict, bytes]:
    end = PREAMBLE + int.from_bytes(content[12:16], "little")
    return json.loads(content[PREAMBLE:end]), content[end:]


def put_together(header: dict, payload: bytes) -> bytes:
    text = json.dumps(header).encode()
    return signed(text + b" " * (-(PREAMBLE + len(text)) % ALIGNMENT), payload)


def signed(text: bytes, payload: bytes) -> bytes:
    """A file with these parts and right checksums, as docs/artifact.md says."""
    start = MAGIC + (1).to_bytes(4, "little") + len(text).to_bytes(4, "little")
    start += len(payload).to_bytes(8, "little") + hashlib.sha256(payload).digest()
    return start + hashlib.sha256(start + text).digest() + text + payload
