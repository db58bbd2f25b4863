"""TOML tables -> frozen structs, with one error that names file, key, what was found and what was expected.

Law: knows types, not meanings. Every key must be a field; units come from the field's annotation (``units``).
"""

from __future__ import annotations

import math
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import msgspec

from dlion.config.errors import ConfigError, Origins, did_you_mean, one_of, origin_of
from dlion.config.units import UNITS

T = TypeVar("T", bound=msgspec.Struct)
FILE_BYTES_MAX = 4 << 20
"""A configuration file larger than this was not written by a human."""


class Text(str):
    """A value from a flag or an environment variable: text that may mean any TOML value."""

    __slots__ = ()

    def plain(self) -> object:
        try:
            return tomllib.loads(f"value = {self}")["value"]
        except tomllib.TOMLDecodeError:
            return str(self)


def read_toml(path: Path) -> dict[str, Any]:
    """The file's tables. Raises ConfigError when it cannot be read or is not TOML."""
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise ConfigError(str(path), "", "file is too large", f"at most {FILE_BYTES_MAX >> 20} MiB of TOML")
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(str(path), "", f"cannot read: {error.strerror}", "a readable TOML file") from error
    except UnicodeDecodeError as error:
        what = f"not valid TOML: {error.reason} at byte {error.start}"
        raise ConfigError(str(path), "", what, "text in UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(str(path), "", f"not valid TOML: {error}") from error


class Reader:
    """Reads one document. ``where`` is its file; ``origins`` says which keys came from elsewhere (layers)."""

    def __init__(self, where: str, origins: Origins | None = None) -> None:
        self._where = where
        self._origins = origins or {}

    def error(self, key: str, found: str, expected: str = "", hint: str = "") -> ConfigError:
        return ConfigError(origin_of(self._origins, key) or self._where, key, found, expected, hint)

    def struct(self, raw: object, kind: type[T], key: str = "") -> T:
        """``raw`` (a table) as ``kind``."""
        if not isinstance(raw, dict):
            raise self.error(key, f"found {show(raw)}", "a table")
        fields = {f.encode_name: f for f in msgspec.structs.fields(kind)}
        hints = typing.get_type_hints(kind, include_extras=True)
        values = {}
        for name, value in raw.items():
            if name not in fields:
                raise self.error(join(key, name), "unknown key", one_of(fields), did_you_mean(name, fields))
            values[fields[name].name] = self.value(value, hints[fields[name].name], join(key, name))
        for name, field in fields.items():
            if field.required and name not in raw:
                raise self.error(join(key, name), "missing", "a value")
        return kind(**values)

    def value(self, raw: object, kind: Any, key: str) -> Any:
        """``raw`` as the annotated type ``kind``."""
        origin, args = get_origin(kind), get_args(kind)
        if origin in (types.UnionType, typing.Union):  # X | None: TOML has no null, so None only by absence
            return self.value(raw, next(a for a in args if a is not type(None)), key)
        if origin is typing.Annotated:
            return self._annotated(raw, kind, key)
        if isinstance(raw, Text):
            raw = str(raw) if kind is str or origin is Literal else raw.plain()
        if origin is Literal and raw not in args:
            raise self.error(key, f"found {show(raw)}", one_of(map(str, args)), did_you_mean(str(raw), args))
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            return self.struct(raw, kind, key)
        if origin is dict:
            if not isinstance(raw, dict):
                raise self.error(key, f"found {show(raw)}", "a table")
            return {name: self.value(value, args[1], join(key, name)) for name, value in raw.items()}
        if origin in (list, tuple) and (origin is list or args[-1] is Ellipsis):
            if not isinstance(raw, list):
                raise self.error(key, f"found {show(raw)}", "a list")
            return origin(self.value(value, args[0], f"{key}[{i}]") for i, value in enumerate(raw))
        return self._leaf(raw, kind, key)

    def _annotated(self, raw: object, kind: Any, key: str) -> Any:
        unit = next((m.extra["unit"] for m in kind.__metadata__ if m.extra and "unit" in m.extra), "")
        if unit:
            parse, words = UNITS[unit]
            try:
                raw = parse(raw)
            except (ValueError, OverflowError):
                raise self.error(key, f"found {show(raw)}", words) from None
        elif isinstance(raw, Text):
            raw = raw.plain()
        return self._leaf(raw, kind, key)

    def _leaf(self, raw: object, kind: Any, key: str) -> Any:
        if isinstance(raw, float) and not math.isfinite(raw):
            raise self.error(key, f"found {raw}", "a finite number")
        try:
            return msgspec.convert(raw, kind)
        except msgspec.ValidationError as error:
            words = str(error).partition(" - at ")[0].partition(", got ")[0].removeprefix("Expected ")
            raise self.error(key, f"found {show(raw)}", words.replace("`", "")) from None


def join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def show(raw: object) -> str:
    """A found value, short enough for one line."""
    text = f'"{raw}"' if isinstance(raw, str) else str(raw).lower() if isinstance(raw, bool) else str(raw)
    return text if len(text) <= 60 else text[:57] + "..."
