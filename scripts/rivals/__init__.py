"""Other frameworks, each a short program ``on_NAME.py`` written as its own documentation says, and what it needs in
``NAME.txt``.

Law: finds and installs them; the only one to know where they are. Imports none.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import msgspec

from dlion.cli.build import Plan

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SETTINGS, READY = "rival.json", ".ready"
RIVALS = sorted(path.stem.removeprefix("on_").replace("_", "-") for path in HERE.glob("on_*.py"))


def program(rival: str) -> Path:
    return HERE / f"on_{rival.replace('-', '_')}.py"


def command(rival: str) -> tuple[str, ...]:
    """Interpreter and program, installed; run directory and peer come behind."""
    return str(environment(rival)), str(program(rival))


def environment(rival: str) -> Path:
    """The interpreter of the virtual environment in which ``rival`` runs; made when it is not there. The project itself
    is put in too: the programs use its data and its log."""
    needs = HERE / f"{rival}.txt"
    folder = ROOT / ".venv-rivals" / rival
    interpreter, ready = folder / "bin" / "python", folder / ".ready"
    if not ready.exists() or ready.stat().st_mtime < needs.stat().st_mtime:
        click.echo(f"installing {rival} into {folder}", err=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(interpreter), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "-r", str(needs), str(ROOT)], check=True)
        ready.touch()
    return interpreter


def named(plan: Plan, rival: str) -> Plan:
    """``plan`` with the rival's name where logs say the strategy."""
    exchange = msgspec.structs.replace(plan.job.exchange, name=rival)
    return replace(plan, job=msgspec.structs.replace(plan.job, exchange=exchange))


def save_settings(out: Path, addresses: Mapping[str, str], options: Iterable[str]) -> None:
    """What the programs read beside the plan. Raises BadParameter for an option without a value."""
    values = dict(option.partition("=")[::2] for option in options)
    if empty := [key for key, value in values.items() if not value]:
        raise click.BadParameter(f"expected KEY=VALUE, got {empty[0]!r}", param_hint="--option")
    (out / SETTINGS).write_text(json.dumps({"addresses": dict(addresses), "options": values}, indent=1) + "\n")


def settings(out: Path) -> dict[str, Any]:
    """What ``save_settings`` wrote: ``addresses`` by peer, in the plan's order, and ``options``."""
    found: dict[str, Any] = json.loads((out / SETTINGS).read_text())
    return found


def began(out: Path, peers: int) -> bool:
    """Have all said that they are ready?"""
    return len(list(out.glob(f"*{READY}"))) >= peers
