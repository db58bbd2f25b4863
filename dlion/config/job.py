"""A job file: what is trained, how, and for how long; and the layers that may overrule it.

Law: values and their cross checks. A strategy's own settings pass through unread: the strategy validates them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from dlion.config.errors import ConfigError, Origins, did_you_mean, one_of
from dlion.config.find import find
from dlion.config.reader import Reader, Text, join, read_toml
from dlion.config.units import Bytes, Count, Positive, PositiveSeconds, Seconds, Share


def plain(name: str) -> str | None:
    """``until_s`` is ``until`` in a file: there, the value carries its unit."""
    return name.removesuffix("_s") if name.endswith("_s") and not name.endswith("per_s") else None


class Table(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename=plain):
    """Base of all tables of all files."""


class JobTable(Table, frozen=True):
    name: str = ""
    """Default: the file's name."""
    workload: str = "digits"
    """A built-in workload, or ``module:factory``."""
    until_s: PositiveSeconds = 60.0
    seed: Count = 0


class Data(Table, frozen=True):
    dir: str = ""
    """Where the workload's files are; "" for those that need none."""
    partition: Literal["iid", "dirichlet", "writer"] = "iid"
    alpha: Annotated[float, Meta(gt=0)] = 0.5
    """Concentration of the Dirichlet partition: smaller is more skewed."""
    train_limit: Count = 0
    """Use only the first so many training samples; 0 = all."""


class Model(Table, frozen=True):
    hidden: tuple[Positive, ...] = (512, 512)
    """Widths of the MLP's hidden layers; empty = softmax regression."""
    size: Positive = 1000
    """Parameters of the toy workload."""
    settings: dict[str, Any] = msgspec.field(default_factory=dict)
    """Handed to a ``module:factory`` workload as keyword arguments."""


class Train(Table, frozen=True):
    batch: Positive = 64
    """Initial samples per step of each peer."""
    learning_rate: Annotated[float, Meta(gt=0)] = 0.1
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    nesterov: bool = False
    weight_decay: Annotated[float, Meta(ge=0)] = 0.0
    betas: tuple[Annotated[float, Meta(ge=0, lt=1)], Annotated[float, Meta(ge=0, lt=1)]] = (0.9, 0.999)
    eps: Annotated[float, Meta(gt=0)] = 1e-8
    schedule: Literal["constant", "cosine", "step"] = "constant"
    """Of the learning rate, over samples that all peers together have trained on."""
    warmup_samples: Count = 0
    decay_samples: Count = 0
    """cosine: where the curve ends; step: samples from one decay to the next."""
    decay_factor: Share = 0.1
    """cosine: the share of the learning rate left at the end; step: the factor of each decay."""


class Batching(Table, frozen=True):
    mode: Literal["fixed", "weighted"] = "weighted"
    """weighted: local batches follow compute power (DLion's local controller)."""
    global_start: Count = 0
    """Global batch at the start; 0 = batch times peers."""
    growth: bool = True
    """DLion's global controller: add up to ``warm_share``, then multiply up to ``speed_share``."""
    warm_add: Positive = 32
    warm_share: Share = 0.01
    """Share of the training set that the global batch reaches by addition."""
    speed_factor: Annotated[float, Meta(gt=1)] = 1.5
    speed_share: Share = 0.1
    """Share of the training set that it reaches by multiplication."""
    period_s: PositiveSeconds = 10.0
    """From one adjustment to the next."""
    weighting: Literal["global", "ratio", "none"] = "global"
    """How a peer's update counts: its share of the global batch (unbiased), the paper's ratio, or equally."""


class ExchangeTable(Table, frozen=True):
    name: str = "pride"
    settings: dict[str, Any] = msgspec.field(default_factory=dict)
    """The strategy's own; a layer that names another strategy leaves these behind."""


class PaceTable(Table, frozen=True):
    name: str = ""
    """"" = the strategy's default."""
    staleness: Count = 5
    spare: Count = 1


class Evaluate(Table, frozen=True):
    every_s: PositiveSeconds = 5.0
    samples: Count = 0
    """Of the held-out set; 0 = all."""
    targets: tuple[Share, ...] = (0.8, 0.85, 0.9)
    """Accuracies whose times are reported."""


class NodeTable(Table, frozen=True):
    heartbeat_s: PositiveSeconds = 3.0
    """The longest silence on a link."""
    suspect_after_s: PositiveSeconds = 5.0
    lost_after_s: PositiveSeconds = 2.0
    """A neighbour whose link is lost and cannot be dialled again is not waited for any longer."""
    start_wait_s: PositiveSeconds = 60.0
    """How long to wait for all neighbours before training starts without the missing."""
    status_every_s: PositiveSeconds = 1.0
    hello_timeout_s: PositiveSeconds = 10.0
    dial_backoff_min_s: PositiveSeconds = 0.1
    dial_backoff_max_s: PositiveSeconds = 5.0
    drain_s: Seconds = 20.0
    """How long a peer that ends with the others waits where nothing moves, and 30 times that at most; that of one that
    leaves them, in all."""
    queue_s: PositiveSeconds = 0.1
    """Seconds of a link's rate that may be in flight beyond its shortest round trip."""
    unacked_bytes_max: Bytes = 64 << 20


class Checkpointing(Table, frozen=True):
    every_s: Seconds = 30.0
    """From one checkpoint of all peers to the next; 0 = none."""
    keep: Positive = 3
    """So many of them stay on the disk."""


BUDGET_BYTES_PER_S_MIN = 1000.0
"""Half of it is taken by what neighbours say to be known as alive."""
DAY_S = 86400.0


class Budget(Table, frozen=True):
    """Hard limits on what may leave this peer's micro-cloud over each link; absent = none."""

    wan_bytes_per_s: Bytes | None = None
    wan_bytes_per_day: Bytes | None = None

    @property
    def bytes_per_s(self) -> float:
        """The stricter one; 0: none."""
        per_day = None if self.wan_bytes_per_day is None else self.wan_bytes_per_day / DAY_S
        return min((float(limit) for limit in (self.wan_bytes_per_s, per_day) if limit is not None), default=0.0)


class Job(Table, frozen=True):
    job: JobTable = JobTable()
    data: Data = Data()
    model: Model = Model()
    train: Train = Train()
    batching: Batching = Batching()
    exchange: ExchangeTable = ExchangeTable()
    pace: PaceTable = PaceTable()
    evaluate: Evaluate = Evaluate()
    node: NodeTable = NodeTable()
    checkpoint: Checkpointing = Checkpointing()
    budget: Budget = Budget()


SECTIONS = Job.__struct_fields__
_SEPARATOR = "__"


def load_job(
    name_or_path: str | Path,
    flags: Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
    directory: Path | None = None,
) -> Job:
    """The job with its layers: flags > environment > ./dlion.toml > user's config.toml > job file > defaults.

    ``flags`` maps key paths (``train.learning_rate``) to values or to text as typed. ``environ`` defaults to the
    process's, ``directory`` (of ``dlion.toml``) to the current one. Raises ConfigError.
    """
    return read_job(name_or_path, flags, environ, directory)[0]


def read_job(
    name_or_path: str | Path,
    flags: Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
    directory: Path | None = None,
) -> tuple[Job, Origins]:
    """``load_job``, and where its keys came from: for errors that show only when the job is used."""
    environ = os.environ if environ is None else environ
    found = find("job", name_or_path)
    layers = [(str(found.path), read_toml(found.path))]
    layers += [(str(p), read_toml(p)) for p in _files(environ, directory or Path()) if p.is_file()]
    layers += _environment(environ)
    layers += _flags(flags or {})
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, layer in layers:
        _settings_belong_to_name(merged, layer)
        _merge(merged, layer, origin, origins)
    reader = Reader(str(found.path), origins)
    job = reader.struct(merged, Job)
    _check(job, reader)
    if not job.job.name:
        job = msgspec.structs.replace(job, job=msgspec.structs.replace(job.job, name=found.name))
    return job, {**origins, "": str(found.path)}


def overruled(job: Job, flags: Mapping[str, object]) -> Job:
    """``job`` with some keys changed, as if ``flags`` had been given to ``load_job``. Raises ConfigError."""
    merged: dict[str, Any] = _known(msgspec.json.decode(msgspec.json.encode(job)))
    origins: dict[str, str] = {}
    for origin, layer in _flags(flags):
        _settings_belong_to_name(merged, layer)
        _merge(merged, layer, origin, origins)
    reader = Reader(job.job.name, origins)
    changed = reader.struct(merged, Job)
    _check(changed, reader)
    return changed


def flag_origins(flags: Iterable[str]) -> Origins:
    """Of keys that ``flags`` overrule."""
    return {key: f"flag {key}" for key in flags}


def _known(table: dict[str, Any]) -> dict[str, Any]:
    """Without the keys that say nothing: TOML has no null."""
    return {k: _known(v) if isinstance(v, dict) else v for k, v in table.items() if v is not None}


def config_hash(*parts: Any) -> str:
    """sha256 of the parts (structs, dataclasses, plain values) as canonical JSON."""
    return hashlib.sha256(msgspec.json.encode(msgspec.to_builtins(parts), order="deterministic")).hexdigest()


def job_hash(job: Job) -> str:
    """sha256 of what all peers of a run must agree on; where the data lies and when to stop is each one's own."""
    data = msgspec.structs.replace(job.data, dir="")
    return config_hash(job.job.workload, job.job.seed, data, job.model, job.train, job.batching, job.exchange, job.pace)


def _files(environ: Mapping[str, str], directory: Path) -> tuple[Path, ...]:
    home = environ.get("XDG_CONFIG_HOME") or str(Path(environ.get("HOME") or "~").expanduser() / ".config")
    return Path(home) / "dlion" / "config.toml", directory / "dlion.toml"


def _environment(environ: Mapping[str, str]) -> list[tuple[str, dict[str, Any]]]:
    """One layer per ``DLION_SECTION__KEY``."""
    found = []
    for name in sorted(environ):
        if name.startswith("DLION_") and _SEPARATOR in name:
            keys = name.removeprefix("DLION_").lower().split(_SEPARATOR)
            found.append((f"environment {name}", _nested(keys, Text(environ[name]))))
    return found


def _flags(flags: Mapping[str, object]) -> list[tuple[str, dict[str, Any]]]:
    """One layer per flag; the strategy's name first, whatever their order: its settings belong to it."""
    ordered = sorted(flags.items(), key=lambda flag: flag[0] != "exchange.name")
    return [(flag_origins([key])[key], _nested(key.split("."), _text(value))) for key, value in ordered]


def _nested(keys: list[str], value: object) -> dict[str, Any]:
    for key in reversed(keys):
        value = {key: value}
    assert isinstance(value, dict)
    return value


def _text(value: object) -> object:
    return Text(value) if isinstance(value, str) else value


def _settings_belong_to_name(merged: dict[str, Any], layer: dict[str, Any]) -> None:
    """A layer that names another strategy does not inherit the settings written for the old one."""
    old, new = merged.get("exchange"), layer.get("exchange")
    if isinstance(old, dict) and isinstance(new, dict) and new.get("name", old.get("name")) != old.get("name"):
        old.pop("settings", None)


def _merge(into: dict[str, Any], layer: dict[str, Any], origin: str, origins: dict[str, str], key: str = "") -> None:
    for name, value in layer.items():
        path = join(key, name)
        if isinstance(value, dict) and isinstance(into.get(name), dict):
            _merge(into[name], value, origin, origins, path)
        elif isinstance(value, dict):
            into[name] = {}
            origins[path] = origin
            _merge(into[name], value, origin, origins, path)
        else:
            into[name] = value
            origins[path] = origin


def _check(job: Job, reader: Reader) -> None:
    """What no single field can know."""
    t, b, n = job.train, job.batching, job.node
    module, colon, factory = job.job.workload.partition(":")
    if not module or (colon and not factory):
        raise reader.error("job.workload", f'found "{job.job.workload}"', 'a workload\'s name or "module:factory"')
    if t.nesterov and not t.momentum:
        raise reader.error("train.nesterov", "found true with momentum 0", "momentum above 0")
    if t.schedule != "constant" and not t.decay_samples:
        raise reader.error("train.decay_samples", "found 0", f"above 0 for the {t.schedule} schedule")
    if t.schedule == "cosine" and t.warmup_samples >= t.decay_samples:
        raise reader.error("train.warmup_samples", f"found {t.warmup_samples}", f"below {t.decay_samples}")
    if b.warm_share > b.speed_share:
        raise reader.error("batching.warm_share", f"found {b.warm_share}", f"at most speed_share = {b.speed_share}")
    if n.dial_backoff_min_s > n.dial_backoff_max_s:
        raise reader.error("node.dial_backoff_min", f"found {n.dial_backoff_min_s}", f"at most {n.dial_backoff_max_s}")
    if n.suspect_after_s <= n.heartbeat_s:
        raise reader.error("node.suspect_after", f"found {n.suspect_after_s}", f"above heartbeat = {n.heartbeat_s}")
    for key, seconds in (("wan_bytes_per_s", 1.0), ("wan_bytes_per_day", DAY_S)):
        limit, least = getattr(job.budget, key), round(BUDGET_BYTES_PER_S_MIN * seconds)
        if limit is not None and limit < least:
            raise reader.error(f"budget.{key}", f"found {limit} bytes", f"at least {least}, or peers seem dead")


def set_flag(text: str) -> tuple[str, str]:
    """``section.key=value`` as typed after ``--set``. Raises ConfigError."""
    key, equals, value = text.partition("=")
    section = key.partition(".")[0]
    if not equals or "." not in key or section not in SECTIONS:
        hint = "" if section in SECTIONS else did_you_mean(section, SECTIONS)
        raise ConfigError("--set", "", f'found "{text}"', f"section.key=value, section {one_of(SECTIONS)}", hint)
    return key.strip(), value.strip()
