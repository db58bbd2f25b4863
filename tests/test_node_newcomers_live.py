"""Real processes: one peer is killed and started again by itself while the others go on, and all agree in the end."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from live_runs import dlion, wait_for
from safetensors.numpy import load_file

from dlion.observe.read import read_directory
from dlion.observe.runlog import Step

NAMES = ("x1", "y1", "z1")
THREE = (
    '[clouds]\nx.members = ["x1"]\ny.members = ["y1"]\nz.members = ["z1"]\n'
    '[[wan]]\nbetween = ["x", "y"]\nbandwidth = "50Mbit"\n[[wan]]\nbetween = ["x", "z"]\nbandwidth = "50Mbit"\n'
    '[[wan]]\nbetween = ["y", "z"]\nbandwidth = "50Mbit"\n'
)
PRIDE = ("--exchange", "pride", "--set", "checkpoint.every=1")


def steps(out: Path, log: str) -> int:
    path = out / f"{log}.jsonl"
    return path.read_text().count('"e":"step"') if path.exists() else 0


def agree(directories: Mapping[str, Path]) -> None:
    """All have written the same model."""
    models = {name: load_file(out / f"{name}.safetensors") for name, out in directories.items()}
    for key, tensor in models["x1"].items():
        for other in ("y1", "z1"):
            np.testing.assert_allclose(models[other][key], tensor, atol=1e-4 * np.abs(tensor).max() + 1e-6)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_peer_that_was_killed_comes_back_by_itself(tmp_path: Path) -> None:
    (tmp_path / "three.toml").write_text(THREE)
    door = 20000 + os.getpid() % 20000
    ports = {name: door + i for i, name in enumerate(NAMES)}
    for name in NAMES:
        others = "".join(f'{o} = "127.0.0.1:{port}"\n' for o, port in ports.items() if o != name)
        (tmp_path / f"{name}.toml").write_text(
            f'name = "{name}"\ntopology = "three.toml"\njob = "toy"\nlisten = "127.0.0.1:{ports[name]}"\n'
            f'out = "{tmp_path / name}"\n[peers]\n{others}'
        )

    def start(name: str, stack: ExitStack) -> object:
        return stack.enter_context(dlion("peer", str(tmp_path / f"{name}.toml"), *PRIDE, "--until", "30s"))

    with ExitStack() as stack:
        lives = {name: start(name, stack) for name in NAMES}
        wait_for(lambda: all(steps(tmp_path / name, name) > 20 for name in NAMES))
        wait_for(lambda: any((tmp_path / "z1" / "checkpoints" / "z1").glob("*/manifest.json")))
        lives["z1"].send_signal(signal.SIGKILL)  # type: ignore[attr-defined]
        lives["z1"].communicate()  # type: ignore[attr-defined]
        lives["z1"] = start("z1", stack)
        told = {name: life.communicate(timeout=90)[1] for name, life in lives.items()}  # type: ignore[attr-defined]
        for name, life in lives.items():
            assert life.returncode == 0, told[name]  # type: ignore[attr-defined]
    assert "the run was under way; came in at step" in told["z1"]
    before, _, after = told["x1"].partition("goes on without z1 (not reached)\n")
    assert "z1 is there\n" in after and "z1 is there\n" not in before
    assert steps(tmp_path / "z1", "z1.2") > 20
    agree({name: tmp_path / name for name in NAMES})
    for name in ("x1", "y1"):
        gaps = np.diff(read_directory(tmp_path / name).peers[name][Step]["t"])
        assert gaps.max() < 2.0, "nobody waited for it"


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("exchange", ["full", "diloco"])
def test_a_peer_of_up_comes_back_in_its_run_directory(tmp_path: Path, exchange: str) -> None:
    """One process of ``dlion up`` is killed; ``dlion peer RUN/z1`` starts it again, where the others look for it."""
    (tmp_path / "three.toml").write_text(THREE)
    out = tmp_path / "run"
    how = ("--job", "toy", "--exchange", exchange, "--pace", "free", "--set", "checkpoint.every=1", "--until", "30s")
    with dlion("up", "--topology", str(tmp_path / "three.toml"), *how, "--out", str(out)) as run:
        wait_for(lambda: all(steps(out, name) > 20 for name in NAMES))
        wait_for(lambda: any((out / "checkpoints" / "z1").glob("*/manifest.json")))
        os.kill(json.loads((out / "z1.host.json").read_text())["pid"], signal.SIGKILL)
        with dlion("peer", str(out / "z1")) as again:
            told = again.communicate(timeout=90)[1]
            assert again.returncode == 0, told
        stdout, stderr = run.communicate(timeout=60)
    assert run.returncode == 0, stderr
    assert "z1 ended by signal SIGKILL" in stdout and "the run was under way; came in at step" in told
    assert steps(out, "z1.2") > 20
    agree(dict.fromkeys(NAMES, out))
    for name in ("x1", "y1"):
        assert np.diff(read_directory(out).peers[name][Step]["t"]).max() < 5.0, "nobody waited for it to come"


def test_a_run_that_says_nothing_of_its_peers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "z1.host.json").write_text("{}")
    with dlion("peer", str(tmp_path / "z1")) as again:
        told = again.communicate(timeout=60)[1]
    assert again.returncode == 74 and "plan.json" in told, told
