"""Exit codes, and how an exception becomes one: what went wrong, where, why, and what to do.

Law: words and numbers; imports no room. An exception's class is looked up only in modules that are already loaded.
"""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

BUG = 1
USAGE = 2
BAD_DATA = 65
NO_PEER = 69
BROKEN_INVARIANT = 70
CANNOT_WRITE = 73
CANNOT_READ = 74
TEMPORARY = 75
REFUSED = 77
CONFIGURATION = 78
INTERRUPTED = 130
DRAIN_CUT_SHORT = 143


@dataclass(eq=False)
class Fault(Exception):  # noqa: N818 - a fault is what happened to the user; our errors are bugs
    """Something that is not our bug: the user, a file, a peer or the machine can mend it."""

    code: int
    what: str
    where: str = ""
    """File, key, peer or address."""
    why: str = ""
    advice: str = ""

    def text(self) -> str:
        lines = [f"error: {self.what}"]
        lines += [f"  {name}: {text}" for name, text in self._details() if text]
        return "\n".join([*lines, f"  (exit code {self.code}, see docs/errors.md)"])

    def _details(self) -> tuple[tuple[str, str], ...]:
        return ("where", self.where), ("why", self.why), ("what to do", self.advice)

    def __str__(self) -> str:
        """One line, for those who catch it in their own program."""
        return "; ".join(filter(None, (self.what, self.where, self.why, self.advice)))


KNOWN: Mapping[str, tuple[int, str]] = {
    "dlion.config.errors:ConfigError": (CONFIGURATION, ""),
    "dlion.learn.data:DataError": (BAD_DATA, "check the files named, and the directory given by --data"),
    "dlion.net.traces:TraceError": (BAD_DATA, ""),
    "dlion.lane:Diverged": (BAD_DATA, ""),
    "dlion.net.link:LinkError": (NO_PEER, "check that the peer runs, and the address and port it is dialled at"),
}
"""``module:class`` of the rooms' own errors -> exit code and advice. Subclasses count.

An error of a class with an ``exit_code`` of its own needs no line here.
"""

EXTRAS: Mapping[str, str] = {"sklearn": "data", "matplotlib": "report", "torch": "torch", "ray": "ray"}
"""Top-level module -> the extra that brings it."""


def fault_of(error: Exception) -> Fault | None:
    """The fault that ``error`` is, or None for a bug."""
    if isinstance(error, Fault):
        return error
    known = _known(error)
    if known is not None:
        return Fault(known[0], str(error), advice=getattr(error, "advice", known[1]))
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in EXTRAS:
        extra = EXTRAS[(error.name or "").partition(".")[0]]
        return Fault(
            CONFIGURATION, f"the package {error.name} is not installed", advice=f"pip install 'dlion[{extra}]'"
        )
    unwritable = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EROFS, errno.EDQUOT)
    if isinstance(error, OSError) and (unwritable or error.filename is not None):
        code, where = CANNOT_WRITE if unwritable else CANNOT_READ, str(error.filename or "")
        advice = "make room there" if unwritable else "check the path, and what this user may do there"
        return Fault(code, "cannot read or write a file", where, error.strerror or str(error), advice)
    return None


def _known(error: Exception) -> tuple[int, str] | None:
    code = getattr(error, "exit_code", None)
    if isinstance(code, int):
        return code, ""
    for name, outcome in KNOWN.items():
        module, _, kind = name.partition(":")
        cls = getattr(sys.modules.get(module), kind, None)
        if cls is not None and isinstance(error, cls):
            return outcome
    return None


@contextmanager
def writing(where: object) -> Iterator[None]:
    """What cannot be written is told as that: an OSError does not say whether it was to be read."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        advice = "name another place, or make room or a folder there that this user may write to"
        why = error.strerror or str(error)
        raise Fault(CANNOT_WRITE, "cannot write", str(error.filename or where), why, advice) from error


def bug_notice(error: Exception, version: str) -> str:
    trace = "".join(traceback.format_exception(error))
    unless = "unless they end in a strategy or workload of your own"
    return f"{trace}\nThis is a bug in dlion {version}: report it with the lines above, {unless}. (exit code {BUG})"
