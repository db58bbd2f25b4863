"""Peer files for a list of hosts, one peer each: ``peer_files.py DIRECTORY HOST... [--job JOB] [--port 7100]``.

For schedulers that say only at the start which hosts there are. All hosts are taken for one micro-cloud; where they
are not, write the topology by hand. Prints nothing; DIRECTORY then holds ``topology.toml`` and ``HOST.toml``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def write(directory: Path, hosts: list[str], job: str, port: int, admin_port: int) -> None:
    """The files; raises OSError, ValueError when a host appears twice."""
    names = {host.partition(".")[0]: host for host in hosts}
    if len(names) != len(hosts):
        raise ValueError(f"the short names of the hosts must differ: {', '.join(hosts)}")
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps  # a TOML string is a JSON string
    addresses = "".join(f"{text(name)} = {text(f'{host}:{port}')}\n" for name, host in names.items())
    topology = f'talk = "mesh"\n\n[clouds]\nhosts.members = {json.dumps(list(names))}\n\n[addresses]\n{addresses}'
    (directory / "topology.toml").write_text(topology)
    for name in names:
        (directory / f"{name}.toml").write_text(
            f"name = {text(name)}\n"
            f'topology = "topology.toml"\njob = {text(job)}\n'
            f'listen = "0.0.0.0:{port}"\nadmin = "127.0.0.1:{admin_port}"\n'
            f"out = {text(str(directory / name))}\n"
            "insecure_plaintext = true # inside the cluster's own network only\n"
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("hosts", nargs="+")
    parser.add_argument("--job", default="fashion-cnn", help="a packaged name, or the absolute path of a file")
    parser.add_argument("--port", type=int, default=7100)
    parser.add_argument("--admin-port", type=int, default=8100)
    arguments = parser.parse_args()
    write(arguments.directory, arguments.hosts, arguments.job, arguments.port, arguments.admin_port)


if __name__ == "__main__":
    main()
