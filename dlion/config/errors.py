"""The one thing that can be wrong with a configuration.

Law: a value with words; knows no file format and no exit code.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches

Origins = Mapping[str, str]
"""Key -> the file, variable or flag that it came from; "" -> where all keys are from that are not here."""


class ConfigError(Exception):
    """A file, environment variable or flag says something impossible.

    ``where`` is the file, variable or flag; ``key`` the path inside it (``train.learning_rate``), "" for the whole.
    """

    def __init__(self, where: str, key: str, found: str, expected: str = "", hint: str = "") -> None:
        self.where, self.key, self.found, self.expected, self.hint = where, key, found, expected, hint
        super().__init__(where, key, found, expected, hint)

    def __str__(self) -> str:
        text = f"{self._place()}: {self.found}"
        if self.expected:
            text += f"; expected {self.expected}"
        return f"{text}. {self.hint}" if self.hint else text

    def _place(self) -> str:
        """``where: key``; a flag or a variable names its key itself."""
        said = _key_in(self.where)
        if not self.key or (said and self.key.startswith(said)):
            return self.where + self.key.removeprefix(said)
        return f"{self.where}: {self.key}"


def _key_in(where: str) -> str:
    """The key that ``flag KEY`` or ``environment DLION_KEY`` is named after, or nothing."""
    kind, _, name = where.partition(" ")
    if kind == "environment":
        return name.removeprefix("DLION_").lower().replace("__", ".")
    return name if kind == "flag" else ""


def origin_of(origins: Origins, key: str) -> str:
    """Where ``key``, or what it lies in, came from; "" when nobody knows."""
    above = key
    while above and (above not in origins or (above != key and _is_table(origins, above))):
        above = above[: max(above.rfind("."), above.rfind("["), 0)]
    return origins.get(above, "")


def _is_table(origins: Origins, key: str) -> bool:
    """What a layer writes into a table says nothing of the other keys there."""
    return any(other.startswith(f"{key}.") for other in origins)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``Did you mean "batch"?``, or nothing when no known name is near."""
    near = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f'Did you mean "{near[0]}"?' if near else ""


def one_of(names: Iterable[str]) -> str:
    """The known names as the end of a sentence."""
    listed = ", ".join(names)
    return f"one of {listed}" if listed else "none here: there are none"
