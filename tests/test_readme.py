"""What the README shows runs as it stands there."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from dlion import testing
from dlion.cli.build import Plan
from dlion.cli.simulate import run_simulation
from dlion.config import load_job, load_topology

README = (Path(__file__).parents[1] / "README.md").read_text()


def block(start: str) -> str:
    """The README's code block that begins with ``start``."""
    blocks: list[str] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    return next(one for one in blocks if one.startswith(start))


def test_the_strategy_of_a_stranger_conforms_and_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file of about forty lines in another project, found by its dotted name."""
    source = block("# my_project/neighbourly.py")
    assert len(source.splitlines()) <= 40
    package = tmp_path / "my_project"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "neighbourly.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))

    job = load_job("toy", {"exchange.name": "my_project.neighbourly:Neighbourly", "job.until": 30}, environ={})
    summary = run_simulation(Plan(job, load_topology("homogeneous")))

    testing.check(sys.modules["my_project.neighbourly"].Neighbourly)
    assert summary["wan_bytes"] > 0 and min(summary["steps"].values()) > 100
    assert summary["staleness"]["max"] >= 0 and not summary["refused"]


def test_every_verb_of_the_readme_exists() -> None:
    from dlion.cli import VERBS

    named = set(re.findall(r"`dlion ([a-z]+)", README)) - {"managed"}
    assert named <= set(VERBS) | {"testing"}, named - set(VERBS)


def test_every_file_that_the_readme_links_exists() -> None:
    root = Path(__file__).parents[1]
    missing = [target for target in re.findall(r"\]\(([^)#:]+)\)", README) if not (root / target).exists()]
    assert not missing
