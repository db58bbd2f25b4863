"""What is asked for by a name: a built-in, or ``package.module:attribute`` of somebody else.

Law: words only; imports nothing and knows no room.
"""

from __future__ import annotations


class UnknownNameError(ValueError):
    """No ``kind`` (exchange, workload) has this name; ``why`` is "" for a name that is not known."""

    def __init__(self, kind: str, name: str, why: str, expected: str = "") -> None:
        self.kind, self.name, self.why, self.expected = kind, name, why, expected
        super().__init__(kind, name, why, expected)

    def __str__(self) -> str:
        text = f"{self.kind} {self.name!r}: {self.why or 'unknown'}"
        return f"{text}; expected {self.expected}" if self.expected else text
