"""Job, topology and peer files (TOML) as frozen typed structs; an unknown key is an error.

Law: reads files and the environment, once, when asked. Builds values only: no peer, no socket, no strategy.
"""

from dlion.config.errors import ConfigError, Origins, origin_of
from dlion.config.find import DIRECTORIES, Found, Kind, find, known
from dlion.config.job import Job, config_hash, flag_origins, job_hash, load_job, overruled, read_job
from dlion.config.peer import PeerFile, PeerSetup, load_peer, load_setup
from dlion.config.topology import load_topology

__all__ = [
    "DIRECTORIES",
    "ConfigError",
    "Found",
    "Job",
    "Kind",
    "Origins",
    "PeerFile",
    "PeerSetup",
    "config_hash",
    "find",
    "flag_origins",
    "job_hash",
    "known",
    "load_job",
    "load_peer",
    "load_setup",
    "load_topology",
    "origin_of",
    "overruled",
    "read_job",
]
