"""The one thing that can be wrong with a configuration.

Law: a value with words; knows no file format and no exit code.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class ConfigError(Exception):
    """A file, environment variable or flag says something impossible.

    ``where`` is the file, variable or flag; ``key`` the path inside it (``train.learning_rate``), "" for the whole.
    """

    def __init__(self, where: str, key: str, found: str, expected: str = "", hint: str = "") -> None:
        self.where, self.key, self.found, self.expected, self.hint = where, key, found, expected, hint
        super().__init__(where, key, found, expected, hint)

    def __str__(self) -> str:
        place = f"{self.where}: {self.key}" if self.key else self.where
        text = f"{place}: {self.found}"
        if self.expected:
            text += f"; expected {self.expected}"
        return f"{text}. {self.hint}" if self.hint else text


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``Did you mean "batch"?``, or nothing when no known name is near."""
    near = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f'Did you mean "{near[0]}"?' if near else ""


def one_of(names: Iterable[str]) -> str:
    """The known names as the end of a sentence."""
    listed = ", ".join(names)
    return f"one of {listed}" if listed else "none here: there are none"
