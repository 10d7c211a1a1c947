"""Replies of a judge on disk: one JSON line each, written as it comes.

A line is written in one piece to the end of the file, so a killed run loses at most the line it was writing; half a line
is passed over when the file is read again, and the next line begins on its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path


class ReplyCache:
    """Key -> reply, in a file or in memory.

    Args:
        path (`Path`, *optional*): The file, which need not be there yet; without it replies are kept in memory.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._found: dict[str, str] = {}
        if path is not None and path.is_file():
            for line in path.read_bytes().split(b"\n"):
                try:
                    row = json.loads(line)
                    self._found[str(row["key"])] = str(row["reply"])
                except (ValueError, KeyError, TypeError):
                    continue

    @staticmethod
    def key(parts: Sequence[str]) -> str:
        """What tells requests apart: SHA-256 of the model's name and the prompt."""
        return hashlib.sha256(json.dumps(list(parts), ensure_ascii=False).encode()).hexdigest()

    def get(self, key: str) -> str | None:
        """The reply, or `None`."""
        return self._found.get(key)

    def put(self, key: str, reply: str) -> None:
        """Keeps a reply; it is on disk when this returns."""
        with self._lock:
            self._found[key] = reply
            if self.path is None:
                return
            self.path.parent.mkdir(parents=True, exist_ok=True)
            line = json.dumps({"key": key, "reply": reply}).encode() + b"\n"
            handle = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                size = os.fstat(handle).st_size
                if size and os.pread(handle, 1, size - 1) != b"\n":
                    line = b"\n" + line
                os.write(handle, line)
            finally:
                os.close(handle)
