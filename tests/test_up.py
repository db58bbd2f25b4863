"""``dlion up`` and ``dlion peer`` as a user starts them: real processes, real sockets, shaped loopback links."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from live_runs import dlion, wait_for
from safetensors.numpy import load_file

from dlion.cli.build import Plan
from dlion.cli.up import Child, Pride
from dlion.observe.read import read_directory
from dlion.observe.runlog import End, Step

pytest.importorskip("sklearn", reason="the digits job needs the extra `data`")
BOUND = 1e-4
"""Relative: how far apart replicas may be after a drain, where the strategy promises consensus."""


def _steps(out: Path, peer: str) -> int:
    path = out / f"{peer}.jsonl"
    return int(read_directory(out).peers[peer][Step]["n"].size) if path.exists() and path.stat().st_size else 0


@pytest.mark.timeout(180)
def test_six_processes_train_to_093_and_agree_after_the_drain(tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ("up", "--topology", "demo", "--target", "0.93", "--until", "120s")
    with dlion(*arguments, "--json", "--out", str(out)) as process:
        stdout, stderr = process.communicate(timeout=170)
    assert process.returncode == 0, stderr
    summary = json.loads(stdout)
    assert summary["accuracy"]["mean"] >= 0.93 and summary["accuracy"]["worst"] >= 0.92
    assert summary["replica_disagreement"] <= BOUND
    assert set(summary["steps"]) == {"a1", "a2", "b1", "b2", "c1", "c2"}
    assert "step: " in stderr and "accuracy: " in stderr, "no greppable progress"
    models = [load_file(out / f"{peer}.safetensors") for peer in summary["steps"]]
    for model in models:
        for name, tensor in model.items():
            np.testing.assert_allclose(tensor, models[0][name], atol=1e-3)


def test_a_target_is_reached_when_all_have_held_it_not_at_one_lucky_moment(tmp_path: Path) -> None:
    pride = Pride(cast(Plan, None), tmp_path, 0.9, print)
    for name, died in (("a", ""), ("b", ""), ("c", "SIGKILL")):
        pride.children[name] = cast(Child, SimpleNamespace(died=died, order=lambda **_: None))
    for peer, accuracy in (("a", 0.91), ("b", 0.93), ("a", 0.89), ("b", 0.93), ("a", 0.91)):
        pride.measured(peer, accuracy)
    assert not pride.reached and not pride.stopping
    pride.measured("a", 0.92)
    assert pride.reached and pride.stopping


@pytest.mark.timeout(150)
def test_survivors_step_on_after_a_sigkill_and_ctrl_c_drains(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with dlion("up", "--topology", "demo", "--until", "1h", "--out", str(out)) as process:
        wait_for(lambda: all(_steps(out, peer) >= 5 for peer in ("a1", "b1", "c1")))
        victim = json.loads((out / "b1.host.json").read_text())["pid"]
        os.kill(victim, signal.SIGKILL)
        survivors = ("a1", "a2", "b2", "c1", "c2")
        before = {peer: _steps(out, peer) for peer in survivors}
        wait_for(lambda: all(_steps(out, peer) >= before[peer] + 10 for peer in survivors))
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert "b1 ended by signal SIGKILL" in stdout
    run = read_directory(out)
    for peer in survivors:
        assert run.peers[peer][End]["t"].size == 1, f"{peer} did not drain"
        assert (out / f"{peer}.safetensors").exists()


@pytest.mark.timeout(120)
def test_a_peer_started_from_its_file_waits_trains_and_leaves_on_sigterm(tmp_path: Path) -> None:
    """Two peers of a file each, started one after the other; one is told to leave, the other goes on."""
    (tmp_path / "two.toml").write_text(
        '[clouds]\nx.members = ["x1"]\ny.members = ["y1"]\n[[wan]]\nbetween = ["x", "y"]\nbandwidth = "100Mbit"\n'
    )
    door = 20000 + os.getpid() % 20000
    for name, other, port, dialled in (("x1", "y1", door, ""), ("y1", "x1", 0, f"127.0.0.1:{door}")):
        (tmp_path / f"{name}.toml").write_text(
            f'name = "{name}"\ntopology = "two.toml"\njob = "digits"\nlisten = "127.0.0.1:{port}"\n'
            f'out = "{tmp_path / name}"\n[peers]\n{other} = "{dialled}"\n'
        )
    with dlion("peer", str(tmp_path / "x1.toml"), "--until", "1h") as first:
        wait_for((tmp_path / "x1" / "x1.host.json").exists)
        with dlion("peer", str(tmp_path / "y1.toml"), "--until", "1h") as second:
            wait_for(lambda: _steps(tmp_path / "x1", "x1") >= 3 and _steps(tmp_path / "y1", "y1") >= 3)
            second.terminate()
            _, told = second.communicate(timeout=40)
            assert second.returncode == 0, told
            assert "SIGTERM" in told
        alone = _steps(tmp_path / "x1", "x1")
        wait_for(lambda: _steps(tmp_path / "x1", "x1") >= alone + 3)
        first.send_signal(signal.SIGINT)
        _, told = first.communicate(timeout=40)
        assert first.returncode == 0, told
    assert load_file(tmp_path / "x1" / "x1.safetensors")


MISTAKES = {
    "unknown job": (("simulate", "--job", "digitz"), 78, "digits"),
    "unknown key": (("simulate", "--set", "train.lerning_rate=1"), 78, "learning_rate"),
    "unknown strategy": (("simulate", "--exchange", "ful"), 78, "full"),
    "impossible setting": (("simulate", "--set", "exchange.settings.n_min=0"), 78, "n_min"),
    "unknown setting": (("simulate", "--exchange", "ako", "--set", "exchange.settings.foo=1"), 78, "foo"),
    "nonsense pace": (("simulate", "--exchange", "dlion", "--pace", "fast"), 78, "lockstep"),
    "unknown peer killed": (("simulate", "--kill", "zz@3"), 2, "zz"),
    "unknown option": (("up", "--tpology", "demo"), 2, "topology"),
    "missing file": (("peer", "./nowhere.toml"), 78, "nowhere.toml"),
}


@pytest.mark.parametrize("arguments, code, hint", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_clear_error_with_its_exit_code(arguments: tuple[str, ...], code: int, hint: str) -> None:
    with dlion(*arguments) as process:
        stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == code, stderr
    assert hint in stderr and "Traceback" not in stderr and not stdout


def test_a_rate_shared_by_processes_is_refused_by_up_and_not_by_simulate(tmp_path: Path) -> None:
    path = tmp_path / "shared.toml"
    path.write_text(
        '[clouds]\na.members = ["a1", "a2"]\nb.members = ["b1"]\n'
        "[compute]\na.samples_per_s = 100\nb.samples_per_s = 100\n"
        '[[wan]]\nbetween = ["a", "b"]\nbandwidth = "10Mbit"\nper = "pair-of-clouds"\n'
    )
    with dlion("up", "--job", "toy", "--topology", str(path), "--out", str(tmp_path / "up")) as process:
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 78 and "shared by a1, a2" in stderr
    with dlion("simulate", "--job", "toy", "--topology", str(path), "--until", "2s", "--json") as process:
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0 and json.loads(stdout)["steps"].keys() == {"a1", "a2", "b1"}, stderr
