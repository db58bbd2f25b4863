"""The ready files of scripts/deploy: parsed, dry run where their program is not here, and run where it is."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dlion.config import load_setup
from dlion.observe.read import parse
from dlion.observe.runlog import Step

DEPLOY = Path(__file__).parent.parent / "scripts" / "deploy"
ROOT = DEPLOY.parent.parent


@pytest.mark.parametrize("name", ["torchrun.sh", "peers.sbatch"])
def test_shell_files_parse(name: str) -> None:
    subprocess.run(["bash", "-n", DEPLOY / name], check=True)


@pytest.mark.parametrize("name", ["train.py", "peer_files.py"])
def test_python_files_parse(name: str) -> None:
    ast.parse((DEPLOY / name).read_text())


def test_slurm_dry_run(tmp_path: Path) -> None:
    """With stand-ins for Slurm's two commands: every host gets a peer file that loads, and every node its command."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "python").symlink_to(sys.executable)
    (tools / "scontrol").write_text("#!/bin/sh\necho node1.example\necho node2.example\n")
    (tools / "srun").write_text(
        '#!/bin/sh\nshift\nfor n in node1.example node2.example; do SLURMD_NODENAME=$n "$@"; done\n'
    )
    (tools / "bash").write_text('#!/bin/sh\nif [ "$1" = -c ]; then exec /bin/bash "$@"; fi\necho "$@"\n')
    for tool in tools.iterdir():
        if not tool.is_symlink():
            tool.chmod(0o755)
    submitted = tmp_path / "submitted"
    submitted.mkdir()
    (submitted / "scripts").symlink_to(DEPLOY.parent)
    environ = {"PATH": f"{tools}:/usr/bin:/bin", "SLURM_SUBMIT_DIR": str(submitted), "SLURM_JOB_ID": "7"}
    environ |= {"SLURM_JOB_NODELIST": "node[1-2]", "PROCESSES": "4"}
    done = subprocess.run(
        ["/bin/bash", DEPLOY / "peers.sbatch"], env=environ, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    run, here = submitted / "runs" / "slurm-7", submitted / "scripts" / "deploy"
    said = [f"{here}/torchrun.sh {run}/{name}.toml 4" for name in ("node1", "node2")]
    assert done.stdout.splitlines() == said
    for name, other in (("node1", "node2"), ("node2", "node1")):
        setup = load_setup(run / f"{name}.toml", environ={})
        assert setup.addresses == {other: f"{other}.example:7100"}
        assert setup.job.job.workload == "fashion-cnn"


def documents() -> dict[str, dict[str, Any]]:
    yaml = pytest.importorskip("yaml", reason="needs PyYAML")
    return {d["kind"]: d for d in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())}


def test_kubernetes_files_fit_together(tmp_path: Path) -> None:
    """Names, labels, ports and probes refer to what is there; and the peer files in it load, one per replica."""
    found = documents()
    service, stateful, files = found["Service"], found["StatefulSet"], found["ConfigMap"]["data"]
    pod = stateful["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    labels = stateful["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"]
    assert service["spec"]["selector"] == stateful["spec"]["selector"]["matchLabels"] == labels
    assert found["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels
    assert stateful["spec"]["serviceName"] == service["metadata"]["name"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    probes = {name: container[name]["httpGet"] for name in container if name.endswith("Probe")}
    assert {name: probe["path"] for name, probe in probes.items()} == {
        "startupProbe": "/livez",
        "livenessProbe": "/livez",
        "readinessProbe": "/readyz",
    }
    assert all(probe["port"] == "admin" for probe in probes.values())
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}

    for name, text in files.items():
        (tmp_path / name).write_text(text)
    names = [f"{stateful['metadata']['name']}-{number}" for number in range(stateful["spec"]["replicas"])]
    for name in names:
        setup = load_setup(tmp_path / f"{name}.toml", environ={})
        assert setup.peer.name == name
        assert setup.peer.listen == f"0.0.0.0:{ports['links']}" and setup.peer.admin == f"0.0.0.0:{ports['admin']}"
        assert setup.addresses == {o: f"{o}.{service['metadata']['name']}:7100" for o in names if o != name}
        assert pod["terminationGracePeriodSeconds"] > setup.job.node.drain_s + 20
    assert set(files) == {"topology.toml", *(f"{name}.toml" for name in names)}


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.timeout(120)
def test_torchrun_runs_the_training_script(tmp_path: Path) -> None:
    """Two processes under torchrun are one peer, which is alone here; three steps, then a clean end."""
    pytest.importorskip("torch", reason="needs the torch extra")
    (tmp_path / "net.toml").write_text('[clouds]\nhere.members = ["solo"]\n')
    out = tmp_path / "out"
    text = f'name = "solo"\ntopology = "net.toml"\njob = "fashion-cnn"\nout = "{out}"\n'
    (tmp_path / "solo.toml").write_text(text)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environ = os.environ | {"PYTHONPATH": str(ROOT), "PATH": path}
    command = ["bash", DEPLOY / "torchrun.sh", tmp_path / "solo.toml", "2", "--steps", "3", "--batch", "4"]
    done = subprocess.run(command, env=environ, check=False, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("step: 0  loss: ")
    (log,) = out.glob("*.jsonl")
    assert [event.samples for event in parse(log.read_bytes()) if isinstance(event, Step)] == [8, 8, 8]
