"""A plain ``pip install`` finds the packaged files too: built as a wheel, installed elsewhere, run from elsewhere."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROGRAM = """
import dlion.config as c, pathlib, sys
assert pathlib.Path(c.__file__).is_relative_to(sys.prefix), c.__file__
for kind in ("job", "topology", "peer"): print(kind, *c.known(kind))
print(c.load_setup("a1").topology.name)
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_installed_wheel_carries_jobs_topologies_and_peers(tmp_path: Path) -> None:
    """Copied without its git history, built, installed into a fresh environment, asked from an empty directory."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("dlion", "topologies", "peers"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, source], check=True, cwd=tmp_path)
    done = subprocess.run(
        [python, "-c", PROGRAM], cwd=tmp_path, check=True, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"}
    )
    lines = [line.split() for line in done.stdout.splitlines()]
    for line, folder in zip(lines, ("dlion/data/jobs", "topologies", "peers"), strict=False):
        assert set(line[1:]) == {path.stem for path in (ROOT / folder).glob("*.toml")}
    assert lines[-1] == ["demo"]
    shown = subprocess.run([tmp_path / "venv/bin/dlion", "topology", "check", "demo"], cwd=tmp_path, check=False)
    assert shown.returncode == 0, sys.version
