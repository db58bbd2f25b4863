#!/usr/bin/env bash
# One peer of several processes on this host: torchrun.sh PEER_FILE [PROCESSES] [arguments of train.py]
# Process 0 holds the node; the others follow it. Start the same on each host, each with its own peer file.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
peer="${1:?usage: torchrun.sh PEER_FILE [PROCESSES] [arguments of train.py]}"
processes="${2:-2}"
shift "$(($# < 2 ? $# : 2))"

# --standalone: the processes find each other on a free port of this host. dlion's own port is in the peer file.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec python -m torch.distributed.run --standalone --nproc-per-node "$processes" "$here/train.py" "$peer" "$@"
