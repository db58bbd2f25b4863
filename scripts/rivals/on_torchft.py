"""torchft: DiLoCo on its fault tolerant ``Manager``; a replica group per peer, the lighthouse in the first peer's host.

As its docstrings and tests have it: outer SGD with Nesterov momentum (0.7, 0.9) every ``sync_every`` inner steps, gloo,
synchronous quorum, no sync of the weights at the start, as all begin alike; a majority as ``min_replicas``, against a
split brain. The pseudo-gradients go in one bucket and travel while the inner steps go on (``sync_delay``, Streaming
DiLoCo's tau; ``alpha`` of the local weights is kept then). ``timeout_s`` is some four times what an all-reduce takes
here: shorter, and a slow link is taken for a death; longer, and a death costs more. A peer is dead after
``heartbeat_s`` of silence and stragglers are waited for up to ``join_s``: the lighthouse command's own defaults.

``mode``: ``diloco``, ``localsgd`` or ``ddp``. ``balanced``: as a quorum waits for the slowest, every peer should be at
its next synchronisation at the same moment. ``steps``: batches of the job's size, and numbers of inner steps in
proportion to the peer's speed, ``sync_every`` in the mean; torchft leaves that number to each replica. ``batch``: the
same number of steps, batches in proportion; learns less. ``no``: the same for all. Each replica weighs the same anyhow.
"""

import itertools
import logging
import os
import socket
import time
from contextlib import nullcontext
from datetime import timedelta

import torch
from kit import here
from torch.optim import SGD

site = here()
own = site.addresses[site.peer]
os.environ["GLOO_SOCKET_IFNAME"] = "wan0"
socket.gethostname = lambda: own  # which torchft tells the others; there is no name server

from torchft import DistributedDataParallel, Manager, Optimizer, ProcessGroupGloo  # noqa: E402
from torchft.coordination import LighthouseServer  # noqa: E402
from torchft.local_sgd import DiLoCo, LocalSGD  # noqa: E402

logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
option = {"mode": "diloco", "balanced": "steps", "sync_every": 10, "sync_delay": 6, "alpha": 0.5, "fragments": 1}
option |= {"outer_lr": 0.7, "outer_momentum": 0.9, "timeout_s": 10, "heartbeat_s": 5, "join_s": 60} | site.options
mode, count, model = option["mode"], len(site.names), site.model
share = site.speeds[site.peer] * count / sum(site.speeds.values())
samples = max(1, round(site.batch * share)) if option["balanced"] == "batch" else site.batch
steps = share if option["balanced"] == "steps" else 1.0
parts, sync_every = int(option["fragments"]), float(option["sync_every"])
every = parts * max(1, round(sync_every * steps / parts))
delay = min(round(float(option["sync_delay"]) * steps), every // parts - 1)
majority, limit, patience = count // 2 + 1, timedelta(seconds=float(option["timeout_s"])), timedelta(minutes=2)

if site.rank == 0:
    beat_ms, join_ms = int(1000 * float(option["heartbeat_s"])), int(1000 * float(option["join_s"]))
    lighthouse = LighthouseServer("[::]:29510", majority, join_timeout_ms=join_ms, heartbeat_timeout_ms=beat_ms)
store = torch.distributed.TCPStore(own, 29600, is_master=True, wait_for_workers=False)
inner = SGD(model.parameters(), lr=site.rate, momentum=site.momentum)
manager = Manager(
    pg=ProcessGroupGloo(timeout=limit),
    load_state_dict=lambda state: (model.load_state_dict(state["model"]), inner.load_state_dict(state["inner"])),
    state_dict=lambda: {"model": model.state_dict(), "inner": inner.state_dict()},
    min_replica_size=majority,
    use_async_quorum=mode == "ddp",
    timeout=limit,
    quorum_timeout=patience,
    connect_timeout=patience,
    rank=0,
    world_size=1,
    store_addr=own,
    store_port=29600,
    lighthouse_addr=f"http://{site.addresses[site.names[0]]}:29510",
    replica_id=f"{site.peer}_{site.rank}",
    hostname=own,
    init_sync=False,
)


def diloco() -> DiLoCo:
    """Its global weights are what a peer serves, not those between two synchronisations."""
    layers = [layer for layer in model.children() if list(layer.parameters())]
    cuts = [len(layers) * part // parts for part in range(parts + 1)]
    groups = [torch.nn.Sequential(*layers[cut:end]) for cut, end in itertools.pairwise(cuts)]
    rate, momentum = float(option["outer_lr"]), float(option["outer_momentum"])
    outer = [SGD(group.parameters(), lr=rate, momentum=momentum, nesterov=momentum > 0) for group in groups]
    served = site.weights()
    site.view = lambda: list(served)
    last = 0
    for group, optimizer in zip(groups, outer, strict=True):
        first, last = last, last + len(list(group.parameters()))

        def publish(*_: object, part: slice = slice(first, last)) -> None:
            served[part] = site.weights()[part]

        optimizer.register_step_post_hook(publish)
    alpha = float(option["alpha"]) if delay else 0.0
    streaming = {"fragment_sync_delay": delay, "fragment_update_alpha": alpha}
    return DiLoCo(manager, groups, inner, outer, every, use_bucketization=True, **streaming)


if not any(site.out.glob("*.ready")):  # a quorum of all, and connected, before the clock begins
    due = time.monotonic() + 60
    while manager.num_participants() < count and time.monotonic() < due:
        manager.start_quorum()
site.model, optimizer, way = model, inner, nullcontext()
if mode == "ddp":
    site.model, optimizer = DistributedDataParallel(manager, model), Optimizer(manager, inner)
else:
    way = diloco() if mode == "diloco" else LocalSGD(manager, model, inner, every)
try:
    with way:
        site.go()
        while True:  # until the site ends the process
            optimizer.zero_grad()
            site.step(samples, optimizer)
except Exception:  # a replica without its lighthouse crashes; what it has is still there
    logging.exception("crashed")
    while True:
        time.sleep(1)
