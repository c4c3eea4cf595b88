"""Kills a process at each of its file operations in turn, which random moments would never hit.

Operations are counted by an audit hook (open for writing, mkdir, rename, remove, truncate, ...) and by wrappers of
those that raise no audit event (write, pwrite, fsync, close). At a write the process is killed before, and, a
second time, after half of the bytes.
"""

import os
import signal
import sys

AUDITED = {
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.truncate",
    "os.link",
    "shutil.rmtree",
    "shutil.move",
}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Countdown:
    """Counts file operations, and kills the process at the one of this number."""

    def __init__(self, at):
        self.at, self.seen = at, 0

    def operation(self):
        if self.seen == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.seen += 1

    def audit(self, event, arguments):
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING
        if writes or event in AUDITED:
            self.operation()

    def install(self, quiet):
        """From now on operations count, but for those on the descriptors `quiet`."""
        write, pwrite, fsync, close = os.write, os.pwrite, os.fsync, os.close

        def writing(descriptor, data):
            if descriptor in quiet:
                return write(descriptor, data)
            self.operation()
            if self.seen == self.at and len(data) > 1:
                write(descriptor, bytes(data)[: len(data) // 2])
            self.operation()
            return write(descriptor, data)

        def counted(call):
            def wrapper(*arguments):
                self.operation()
                return call(*arguments)

            return wrapper

        os.write, os.pwrite = writing, counted(pwrite)
        os.fsync, os.close = counted(fsync), counted(close)
        sys.addaudithook(self.audit)


def killed_at(at, scenario, *arguments):
    """Run `scenario(*arguments, told)` in a forked process that is killed at its operation number `at`.

    `told(byte)` reports something as done. Returns the bytes that were told, and how many operations there were
    where the process came to its end (None where it was killed).
    """
    receive, send = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            os.close(receive)
            countdown = Countdown(at)
            countdown.install({send})
            scenario(*arguments, lambda byte: os.write(send, byte))
            os.write(send, b"\0" + str(countdown.seen).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(send)
    told = b""
    while more := os.read(receive, 1 << 16):
        told += more
    os.close(receive)
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert killed or os.WEXITSTATUS(status) == 0, f"the process broke at operation {at}"
    done, _, seen = told.partition(b"\0")
    return done, None if killed else int(seen)


def operations(scenario, *arguments):
    """How many file operations the scenario has."""
    _, seen = killed_at(-1, scenario, *arguments)
    assert seen is not None
    return seen
