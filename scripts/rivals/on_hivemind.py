"""hivemind: a DHT over libp2p, peers that find each other in it for every round, and butterfly all-reduce.

``mode=background`` (default): every peer trains by itself; every few seconds its ``TrainingStateAverager`` averages
parameters with the group beside the training, as its docstring shows, and the change is added to weights that have
moved on (hivemind's delta rule). ``local`` is ``hivemind.Optimizer`` with ``use_local_updates``, meant to be the same;
but its next step waits for the round, a quarter of the time here. Its default, large synchronous batches, makes an
update in some five seconds here, far too few. What is served is the last average: better than a live model.

Chosen: a group of six begins when all are in it, not when matchmaking's time is up; 16 bits, as the documentation
advises; averages weighted by samples; steps of at most 0.4 s, so that slow peers see the end of a round in time, with a
rate in proportion to the batch; progress fetched every second, or else peers end an epoch seconds apart.
"""

import os
import signal
import time
from functools import partial

import hivemind
import torch
from hivemind.compression import Float16Compression, NoCompression
from hivemind.optim.state_averager import TrainingStateAverager
from kit import here


def die_together() -> None:
    """hivemind's daemons outlive a killed trainer, and would answer for it: a host without power answers nothing."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.close(writing)
        os.read(reading, 1)  # returns when the trainer is gone
        os.killpg(0, signal.SIGKILL)
    os.register_at_fork(after_in_child=partial(os.close, writing))


def serve(averager: TrainingStateAverager) -> None:
    """The last average is what others may have, as soon as there is one."""
    if not averager.pending_updates:
        with averager.get_tensors() as tensors:
            arrays = site.arrays(tensors[: len(averager.main_parameters)])
        if (arrays[-1] != start[-1]).any():
            site.view = lambda: arrays


die_together()
site = here()
option = site.options.get
mode = option("mode", "background")
matchmaking_s, timeout_s = float(option("matchmaking", "4")), float(option("timeout", "10"))
batch = min(site.batch, round(site.speeds[site.peer] * float(option("step", "0.4"))))
compression = Float16Compression() if option("compression", "float16") == "float16" else NoCompression()
group = {"target_group_size": len(site.names), "request_timeout": matchmaking_s / 2}
sgd = partial(torch.optim.SGD, lr=site.rate * batch / site.batch, momentum=site.momentum)
start = site.weights()

contact = site.out / "hivemind.txt"
while site.rank and not contact.exists():
    time.sleep(0.05)
initial = contact.read_text().split() if site.rank else None
dht = hivemind.DHT(initial, start=True, host_maddrs=[f"/ip4/{site.addresses[site.peer]}/tcp/7200"])
if not site.rank:
    (new := contact.with_suffix(".new")).write_text("\n".join(map(str, dht.get_visible_maddrs())))
    new.rename(contact)

if mode == "background":
    optimizer = sgd(site.model.parameters())
    averager = TrainingStateAverager(
        dht=dht,
        prefix="lab",
        optimizer=optimizer,
        delta_rule_averaging=True,
        compression=compression,
        min_matchmaking_time=matchmaking_s,
        allreduce_timeout=timeout_s,
        next_chunk_timeout=timeout_s / 2,
        start=True,
        **group,
    )
    every_s, weighted = float(option("every", "3")), option("weighted", "1") == "1"
    site.go()
    due, samples = time.time() // every_s + 1, 0
    while True:
        site.step(batch, optimizer)
        samples += batch
        averager.step()  # adds what has been averaged
        serve(averager)
        if time.time() >= due * every_s and not averager.pending_updates:
            how = {"timeout": timeout_s, "weight": float(samples) if weighted else 1.0}
            averager.step(averaging_round=True, delay_averaging=True, averaging_opts=how)
            due, samples = time.time() // every_s + 1, 0
else:
    optimizer = hivemind.Optimizer(
        dht=dht,
        run_id="lab",
        use_local_updates=True,
        target_batch_size=int(option("target", "8192")),
        batch_size_per_step=batch,
        params=site.model.parameters(),
        optimizer=sgd,
        matchmaking_time=matchmaking_s,
        averaging_timeout=timeout_s,
        next_chunk_timeout=timeout_s / 2,
        state_averaging_compression=compression,
        load_state_compression=compression,
        averager_opts=group,
        tracker_opts={"min_refresh_period": 0.2, "max_refresh_period": 1.0},
    )
    site.go()
    while True:
        site.step(batch, optimizer)
        serve(optimizer.state_averager)
