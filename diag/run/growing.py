"""A file that grows by whole records: an append is one write, and one that failed leaves nothing behind.

What a call has written survives SIGKILL; a record that was under way may be torn at the end of the file.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

COPY_CHUNK = 1 << 20


class Growing:
    """The open file `path`, cut to `size` bytes that hold `count` records."""

    def __init__(self, path: Path, size: int = 0, count: int = 0) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        if os.fstat(self.descriptor).st_size > size:
            os.ftruncate(self.descriptor, size)
        os.lseek(self.descriptor, size, os.SEEK_SET)
        self._now = self._next = (size, count)

    def count(self) -> int:
        """How many records the file holds: the number of the next one."""
        at = os.lseek(self.descriptor, 0, os.SEEK_CUR)
        if at != self._now[0]:
            if at == self._next[0]:  # an interrupt came between the write and the count of it
                self._now = self._next
            else:
                os.lseek(self.descriptor, self._now[0], os.SEEK_SET)
        return self._now[1]

    def append(self, data: bytes, records: int = 1) -> None:
        """Append records, after `count` was asked for. Raises OSError where they cannot be written whole."""
        descriptor, written = self.descriptor, 0
        self._next = (self._now[0] + len(data), self._now[1] + records)
        try:
            while written < len(data):
                written += os.write(descriptor, data[written:] if written else data)
        except OSError:
            with contextlib.suppress(OSError):  # where that fails, too, the next append writes over it
                os.ftruncate(descriptor, self._now[0])
            raise
        self._now = self._next

    def is_removed(self) -> bool:
        """Whether somebody has removed the file, so that what is written to it would be lost."""
        return os.fstat(self.descriptor).st_nlink == 0

    def is_at_path(self) -> bool:
        """Whether the file at the path is this one."""
        try:
            return os.path.samestat(os.fstat(self.descriptor), os.stat(self.path))
        except OSError:
            return False

    def restore(self) -> None:
        """Write the file again at its path, with all that it held. Raises OSError where that cannot be done."""
        new = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            for at in range(0, self._now[0], COPY_CHUNK):
                os.write(new, os.pread(self.descriptor, min(COPY_CHUNK, self._now[0] - at), at))
        except OSError:
            os.close(new)
            self.path.unlink(missing_ok=True)
            raise
        os.close(self.descriptor)
        self.descriptor = new

    def close(self) -> None:
        """Close the file."""
        os.close(self.descriptor)
