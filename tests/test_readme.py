"""What the README shows runs as it stands there."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dlion import testing
from dlion.cli.build import Plan
from dlion.cli.simulate import run_simulation
from dlion.config import load_job, load_topology
from dlion.exchange import find, names
from dlion.named import UnknownNameError

README = (Path(__file__).parents[1] / "README.md").read_text()


def block(start: str) -> str:
    """The README's code block that begins with ``start``."""
    blocks: list[str] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    return next(one for one in blocks if one.startswith(start))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a stranger's project, which Python looks into."""
    package = tmp_path / "my_project"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "neighbourly.py").write_text(block("# my_project/neighbourly.py"))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_project"]:
        del sys.modules[name]


def test_an_installed_strategy_is_found_by_its_entry_point_and_a_broken_one_is_one_error(project: Path) -> None:
    installed = project / "my_project-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: my_project\nVersion: 1.0\n")
    told = re.findall(r"```toml\n\[project.entry-points.\"dlion.exchange\"\]\n(.*?)```", README, re.DOTALL)[0]
    lines = [line.replace('"', "") for line in told.splitlines()]
    (installed / "entry_points.txt").write_text(
        "\n".join(["[dlion.exchange]", *lines, "broken = no_such_module:Broken"])
    )
    assert find("neighbourly").name == "neighbourly" and "neighbourly" in names()
    with pytest.raises(UnknownNameError, match="no_such_module"):
        find("broken")


def test_the_strategy_of_a_stranger_conforms_and_trains(project: Path) -> None:
    """One file of about forty lines in another project, found by its dotted name."""
    assert len(block("# my_project/neighbourly.py").splitlines()) <= 40
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
