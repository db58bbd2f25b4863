"""One of two gloo processes that are one peer: ``python torch_attach_rank.py DIRECTORY RANK``. Run by a test.

Trains peer "site" with the other peers of DIRECTORY; then a peer that is alone and whose node fails.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch_attach_kit import BATCH, StoreMeeting, batches, loop, mlp, setups, sgd, values

from dlion.config import load_setup
from dlion.torch import Options, attach

STEPS = 12


def part(name: str, rank: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """This process's half of each batch of the peer."""
    half = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
    return ((inputs[half], targets[half]) for inputs, targets in batches(name, STEPS))


def made() -> nn.Module:
    torch.manual_seed(0)
    return DistributedDataParallel(mlp())


def trains(directory: Path, rank: int) -> None:
    model = made()
    group = distributed.group.WORLD
    options = Options(addresses=StoreMeeting(directory / "meeting", ["site", "x", "y"]).of("site"))
    setup = load_setup(directory / "site.toml", environ={})
    with attach(model, sgd(model), setup, batch_size=BATCH // 2, process_group=group, options=options) as pride:
        assert pride.batch_size == BATCH // 2
        loop(pride, model, part("site", rank))
    np.save(directory / f"rank{rank}.npy", values(model).numpy())


def fails(directory: Path, rank: int) -> None:
    (directory / str(rank)).mkdir()
    model, setup = made(), setups(directory / str(rank), ["solo"])["solo"]
    steps = 0
    try:
        with attach(model, sgd(model), setup, batch_size=1, process_group=distributed.group.WORLD) as pride:
            for inputs, _ in part("solo", rank):
                (model(inputs).sum() * (float("nan") if steps == 2 else 1.0)).backward()
                pride.step()
                steps += 1
    except (ArithmeticError, RuntimeError) as error:
        (directory / f"error{rank}.txt").write_text(f"{steps} {type(error).__name__}: {error}")


def main(directory: Path, rank: int) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{directory}/group", rank=rank, world_size=2)
    trains(directory, rank)
    fails(directory, rank)
    distributed.barrier()  # who goes first pulls the threads from under the other
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
