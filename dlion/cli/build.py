"""From configuration to a node: the composition root's workshop.

Law: the one place where files' values become objects of all rooms. Knows every room; nobody knows it but the verbs.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from inspect import Parameter, signature
from pathlib import Path

import msgspec

from dlion import __version__, exchange
from dlion.config import ConfigError, Job, Origins, config_hash, job_hash, origin_of
from dlion.config.errors import did_you_mean, one_of
from dlion.config.reader import show
from dlion.cut import name_of
from dlion.exchange.base import Exchange
from dlion.exchange.pace import PACES, Pace
from dlion.identity import Identity
from dlion.learn import schedules, workloads
from dlion.learn.batching import Batcher, Fixed, GlobalBatch, Weighted
from dlion.learn.optimizers import AdamW, Optimizer, Plain, Sgd
from dlion.learn.trainer import Trainer, peer_seed
from dlion.learn.workload import Choosing, Workload, WorkloadSpec
from dlion.mesh.topology import Topology
from dlion.messages import PeerId
from dlion.named import UnknownNameError
from dlion.neighbours import DialSettings
from dlion.node import Learner, Node, NodeSettings, Seams
from dlion.observe.runlog import Header, RunLog
from dlion.tensors import sketch


@dataclass(frozen=True)
class Plan:
    """One run, as configured: what every peer of it is built from."""

    job: Job
    topology: Topology
    run: str = "run"
    shares: tuple[float, ...] = ()
    """Data shares of the peers in sorted order; () = equal."""
    origins: Origins = field(default_factory=dict, compare=False)
    """Where the job's keys came from, as far as anybody knows."""

    @property
    def network(self) -> Topology:
        """The topology as bytes meet it: no link between micro-clouds carries more than the budget."""
        return self.topology.capped(self.job.budget.bytes_per_s)

    @property
    def peers(self) -> list[PeerId]:
        return sorted(self.topology.peers)

    def wrong(self, key: str, found: str, expected: str = "", hint: str = "") -> ConfigError:
        """A value of the job that makes no sense."""
        return ConfigError(origin_of(self.origins, key) or self.job.job.name, key, found, expected, hint)


PLAIN: Mapping[str, type] = {kind.__name__: kind for kind in (bool, int, float, str)}
"""Types of settings that are told from their annotations."""


def _unknown(plan: Plan, key: str, error: UnknownNameError, names: Iterable[str]) -> ConfigError:
    """What stands at ``key`` names nothing, or nothing that can be had."""
    found = f"found {show(error.name)}"
    if error.why:
        return plan.wrong(key, f"{found}: {error.why}", error.expected)
    return plan.wrong(key, found, error.expected, did_you_mean(error.name, names))


def exchange_of(plan: Plan) -> Exchange:
    """The strategy with its settings; raises ConfigError."""
    name = plan.job.exchange.name
    try:
        cls = exchange.find(name)
    except UnknownNameError as error:
        raise _unknown(plan, "exchange.name", error, exchange.names()) from error
    settings = settings_of(plan, cls)
    _check_settings(plan, cls)
    try:
        made = cls(**settings)
    except (TypeError, ValueError) as error:
        raise _wrong_setting(plan, cls.name, str(error)) from error
    return made


def _check_settings(plan: Plan, cls: type[Exchange]) -> None:
    """Every setting is one that the strategy takes, and of its type where that is a plain one."""
    takes = signature(cls).parameters
    if any(p.kind is Parameter.VAR_KEYWORD for p in takes.values()):
        return
    for name, value in plan.job.exchange.settings.items():
        key = f"exchange.settings.{name}"
        if name not in takes:
            expected = f"a setting of {cls.name}, {one_of(takes)}"
            raise plan.wrong(key, "unknown key", expected, did_you_mean(name, takes))
        written = takes[name].annotation
        kind = PLAIN.get(getattr(written, "__name__", written))
        try:
            msgspec.convert(value, kind or object)
        except msgspec.ValidationError:
            raise plan.wrong(key, f"found {show(value)}", kind.__name__ if kind else "") from None


def _wrong_setting(plan: Plan, strategy: str, why: str) -> ConfigError:
    """The strategy's own words, at the one setting that they are about, if that can be told."""
    why = why.removeprefix(f"{strategy}: ")
    named = [name for name in plan.job.exchange.settings if re.search(rf"\b{re.escape(name)}\b", why)]
    if len(named) != 1:
        return plan.wrong("exchange.settings", f"{strategy}: {why}")
    return plan.wrong(f"exchange.settings.{named[0]}", why.removeprefix(f"{named[0]} "))


def settings_of(plan: Plan, cls: type[Exchange]) -> dict[str, object]:
    """The strategy's own settings, and the job-wide ones that it takes; raises ConfigError."""
    job = plan.job
    settings = dict(job.exchange.settings)
    if "weighting" in getattr(cls.__init__, "__annotations__", {}):
        settings.setdefault("weighting", job.batching.weighting)
    return settings


def pace_of(plan: Plan, made: Exchange) -> Pace:
    """The job's pace, or the strategy's own; raises ConfigError for one that makes no sense with the strategy."""
    job = plan.job
    name = job.pace.name or made.pace
    if name not in PACES:
        raise plan.wrong("pace.name", f"found {show(name)}", one_of(PACES), did_you_mean(name, PACES))
    borne = [known for known in PACES if {*known.split("+")} <= {*made.paces}]
    if name not in borne:
        raise plan.wrong("pace.name", f'"{name}" makes no sense with {made.name}', one_of(borne))
    cls = PACES[name]
    return cls(**{own.name: getattr(job.pace, own.name) for own in fields(cls)}) if is_dataclass(cls) else cls()


def workload_of(plan: Plan, peer: PeerId) -> Workload:
    """The model and ``peer``'s part of the data; raises ConfigError, DataError."""
    job, peers = plan.job, plan.peers
    spec = WorkloadSpec(
        name=job.job.workload,
        hidden=job.model.hidden,
        size=job.model.size,
        partition=job.data.partition,
        alpha=job.data.alpha,
        seed=job.job.seed,
        data_dir=Path(job.data.dir) if job.data.dir else None,
        train_limit=job.data.train_limit or None,
    )
    try:
        workload = workloads.build(spec, peers.index(peer), peers, plan.shares or (1.0,) * len(peers))
    except UnknownNameError as error:
        raise _unknown(plan, "job.workload", error, workloads.WORKLOADS) from error
    except ValueError as error:
        raise plan.wrong("job.workload", f"{show(spec.name)}: {error}") from error
    _one_thread(workload)
    return workload


def _one_thread(workload: Workload) -> None:
    """Peers are the parallelism, and one thread makes torch's sums the same every time."""
    module, torch = sys.modules.get("dlion.learn.workloads.torch_module"), sys.modules.get("torch")
    if module is not None and torch is not None and isinstance(workload, module.TorchWorkload):
        torch.set_num_threads(1)


def optimizer_of(job: Job, consumes: str) -> Optimizer:
    t = job.train
    if consumes == "gradient":
        return Plain()
    if t.optimizer == "adamw":
        return AdamW(betas=t.betas, eps=t.eps, weight_decay=t.weight_decay)
    return Sgd(momentum=t.momentum, nesterov=t.nesterov, weight_decay=t.weight_decay)


def schedule_of(job: Job) -> schedules.Schedule:
    t = job.train
    rate: schedules.Schedule = schedules.Constant(t.learning_rate)
    if t.schedule == "cosine":
        rate = schedules.Cosine(t.learning_rate, t.decay_samples, t.learning_rate * t.decay_factor)
    elif t.schedule == "step":
        decays = tuple(float(t.decay_samples * k) for k in range(1, 65))
        rate = schedules.Step(t.learning_rate, decays, t.decay_factor)
    return schedules.WarmUp(t.warmup_samples, rate) if t.warmup_samples else rate


def batcher_of(plan: Plan, peer: PeerId, train_size: int) -> Batcher:
    job = plan.job
    b, train = job.batching, job.train
    if b.mode == "fixed":
        return Fixed(train.batch)
    sizes = GlobalBatch(
        start=b.global_start or train.batch * len(plan.peers),
        train_size=train_size,
        period_s=b.period_s if b.growth else float("inf"),
        warm_add=b.warm_add,
        speed_factor=b.speed_factor,
        warm_share=b.warm_share,
        speed_share=b.speed_share,
    )
    return Weighted(peer, sizes)


def talking(plan: Plan) -> Plan:
    """``plan``, with how its peers talk: as the strategy, if known here, likes where the topology does not say."""
    try:
        bridged = exchange.find(plan.job.exchange.name).bridged
    except UnknownNameError:
        return plan
    return replace(plan, topology=plan.topology.settled(bridged=bridged))


def learner_of(plan: Plan, peer: PeerId, workload: Workload, strategy: Exchange) -> Learner:
    """What ``peer`` computes, by the job; raises ConfigError when the workload's own optimizer does not fit."""
    job = plan.job
    optimizer = optimizer_of(job, strategy.consumes)
    if isinstance(workload, Choosing):
        try:
            optimizer = workload.optimizer(optimizer)
        except ValueError as error:
            raise plan.wrong("exchange.name", f'"{strategy.name}": {error}') from error
    trainer = Trainer(workload, optimizer, schedule_of(job), peer_seed(job.job.seed, peer))
    return Learner(trainer, batcher_of(plan, peer, workload.global_train_size))


def node_settings(job: Job) -> NodeSettings:
    n = job.node
    return NodeSettings(
        until_s=job.job.until_s,
        status_every_s=n.status_every_s,
        evaluate_every_s=job.evaluate.every_s,
        checkpoint_every_s=job.checkpoint.every_s,
        suspect_after_s=n.suspect_after_s,
        lost_after_s=n.lost_after_s,
        start_wait_s=n.start_wait_s,
        drain_s=n.drain_s,
        unacked_bytes_max=n.unacked_bytes_max,
        queue_s=n.queue_s,
        wan_bytes_per_s=job.budget.bytes_per_s,
        dial=DialSettings(
            hello_timeout_s=n.hello_timeout_s,
            backoff_min_s=n.dial_backoff_min_s,
            backoff_max_s=n.dial_backoff_max_s,
            heartbeat_s=n.heartbeat_s,
        ),
    )


def identity_of(plan: Plan, peer: PeerId, workload: Workload, incarnation: int) -> Identity:
    """``job``: with who is in which micro-cloud, and how they talk. ``model``: half of it says names and shapes, half
    the starting values. Peers that differ in any of these would drift apart unnoticed."""
    topology = plan.topology
    clouds = sorted((p, topology.cloud_of(p)) for p in plan.peers)
    job = config_hash(job_hash(plan.job), topology.talk, clouds)[:16]
    start = sketch(workload.initial(plan.job.job.seed).flat)
    model = f"{workload.layout.digest[:16]}/{start}"
    return Identity(plan.run, peer, incarnation, job, model)


def write_header(plan: Plan, identity: Identity, workload: Workload, log: RunLog) -> None:
    job = plan.job
    log.write(
        Header(
            t=0.0,
            version=__version__,
            run=plan.run,
            peer=identity.peer,
            cloud=plan.topology.cloud_of(identity.peer),
            incarnation=identity.incarnation,
            seed=job.job.seed,
            config=config_hash(job, plan.topology.digest)[:16],
            exchange=job.exchange.name,
            job=job.job.name,
            topology=plan.topology.name,
            model=workload.layout.digest,
            model_bytes=4 * workload.layout.size,
        )
    )


def node_of(
    plan: Plan,
    peer: PeerId,
    seams: Seams,
    *,
    workload: Workload,
    incarnation: int = 1,
    settings: NodeSettings | None = None,
    learner: Learner | None = None,
) -> Node:
    """The node of ``peer``, with its header written. ``learner``: in place of the job's, around ``workload``."""
    job = plan.job
    strategy = exchange_of(plan)
    plan = talking(plan)
    learner = learner or learner_of(plan, peer, workload, strategy)
    identity = identity_of(plan, peer, workload, incarnation)
    if seams.resume is not None:
        identity = replace(identity, cut=name_of(seams.resume.number))
    write_header(plan, identity, workload, seams.log)
    pace = pace_of(plan, strategy)
    return Node(identity, plan.topology, learner, strategy, pace, seams, settings or node_settings(job))


def check(plan: Plan) -> Plan:
    """``plan``, after its strategy, settings and pace were found to make sense; raises ConfigError."""
    pace_of(plan, exchange_of(plan))
    return plan


def known_workload(plan: Plan) -> Plan:
    """``plan``, after its workload was found to be one that dlion can make by its name; raises ConfigError."""
    try:
        workloads.check(plan.job.job.workload)
    except UnknownNameError as error:
        raise _unknown(plan, "job.workload", error, workloads.WORKLOADS) from error
    return plan


def modelled(plan: Plan) -> Plan:
    """``plan``, after every peer was found to have a speed: virtual time knows no real one. Raises ConfigError."""
    unstated = [peer for peer, spec in plan.topology.peers.items() if spec.speed is None]
    if unstated:
        found = f"nothing says how fast {', '.join(unstated)} would be in virtual time"
        hint = f"Add compute.{plan.topology.cloud_of(unstated[0])}.samples_per_s, or see docs/traces.md."
        raise ConfigError(plan.topology.name, "compute", found, "a speed of every peer", hint)
    return plan
