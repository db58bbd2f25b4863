"""A training loop as yours may be, for the launch files beside this one: ``train.py PEER_FILE [--steps N]``.

Alone, or under torchrun as several processes of one peer. Put your model and data in the place of ``model`` and
``batches``. SIGTERM, which Slurm and Kubernetes send before they kill, ends the loop; leaving the block then drains.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterator

import torch
from torch import distributed, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from dlion.learn.workloads.fashion_cnn import cnn
from dlion.torch import attach


def model() -> nn.Module:
    torch.manual_seed(0)  # all peers must start from equal values
    return cnn()


def batches(size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator()
    draw.seed()
    while True:
        targets = torch.randint(0, 10, (size,), generator=draw)
        yield torch.randn(size, 1, 28, 28, generator=draw) + targets.view(-1, 1, 1, 1) / 10, targets


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("peer", help="a peer file")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=32, help="of each process")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    device, net, group = torch.device("cpu"), model(), None
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    net = net.to(device)
    if "RANK" in os.environ:  # torchrun's mark
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        net, group = DistributedDataParallel(net), distributed.group.WORLD
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    with attach(net, optimizer, arguments.peer, batch_size=arguments.batch, process_group=group) as pride:
        for step, (inputs, targets) in zip(range(arguments.steps), batches(arguments.batch), strict=False):
            optimizer.zero_grad()
            loss = cross_entropy(net(inputs.to(device)), targets.to(device))
            loss.backward()
            pride.step(loss)
            if step % 50 == 0 and os.environ.get("RANK", "0") == "0":
                print(f"step: {step}  loss: {float(loss):.4f}", flush=True)
    if group is not None:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
