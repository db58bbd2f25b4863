"""Where a job, topology or peer file is: a path, or the name of one that comes with dlion.

Law: finds files; does not read them. A path wins over a packaged name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

from dlion.config.errors import ConfigError, did_you_mean, one_of

Kind = Literal["job", "topology", "peer"]
DIRECTORIES: Mapping[Kind, str] = {"job": "jobs", "topology": "topologies", "peer": "peers"}


@dataclass(frozen=True)
class Found:
    path: Path
    name: str
    """The packaged name, or the file's name without ``.toml``."""


def find(kind: Kind, name_or_path: str | Path) -> Found:
    """The file of this kind. Raises ConfigError (with the known names) when there is none."""
    text = os.fspath(name_or_path)
    path = Path(text).expanduser()
    separators = {os.sep, os.altsep or os.sep}
    if any(s in text for s in separators) or text.endswith(".toml") or path.is_file():
        if not path.is_file():
            raise ConfigError(text, "", f"no such {kind} file", "the path of a TOML file or a packaged name")
        return Found(path, path.stem)
    packaged = known(kind)
    if text not in packaged:
        raise ConfigError(text, "", f"no such {kind}", f"a path or {one_of(packaged)}", did_you_mean(text, packaged))
    return Found(packaged[text], text)


def known(kind: Kind) -> dict[str, Path]:
    """The packaged files of this kind by name, in order."""
    return {path.stem: path for path in sorted(_directory(kind).glob("*.toml"), key=lambda path: path.stem)}


def _directory(kind: Kind) -> Path:
    """Inside the installed package, or at the top of a source checkout (where data lies beside the code)."""
    package = Path(str(resources.files("dlion").joinpath("py.typed"))).parent
    inside = package / "data" / DIRECTORIES[kind]
    return inside if inside.is_dir() else package.parent / DIRECTORIES[kind]
