"""Flower: federated averaging in rounds, a server in the first peer's process and a client in every peer's.

The gRPC API of ``start_server`` and ``start_client``: streams that stay open, over which the server pushes. Flower 1.42
calls it deprecated and recommends SuperLink and SuperNodes instead, of which both ask for messages every 3 s only: as
long as a round here. A round lasts for a fixed time, not for a number of epochs, so that no peer waits for a slow one;
models are averaged by how many samples they saw; momentum starts anew in every round, as in Flower's tutorials. No
evaluation by the clients: it would send every model once more. Whoever is connected takes part in the next round.

Options: ``round_s``, the time to train in a round; ``server_rate`` and ``server_momentum``, those of FedAvgM, which is
FedAvg where they are 1 and 0.
"""

import os

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"  # read on import

import threading
import time
from contextlib import suppress

import grpc
import torch
from flwr.client import NumPyClient, start_client
from flwr.common import ndarrays_to_parameters
from flwr.server import ServerConfig, start_server
from flwr.server.strategy import FedAvgM
from kit import here

site = here()
round_s = float(site.options.get("round_s", 4.8))
address = f"{site.addresses[site.names[0]]}:8080"
optimizer = torch.optim.SGD(site.model.parameters(), lr=site.rate, momentum=site.momentum)
began = threading.Event()


class Peer(NumPyClient):
    def fit(self, parameters, config):
        if not began.is_set():  # the first round: everybody is connected
            began.set()
            site.go()
        site.fill(parameters)
        site.view = lambda: parameters
        optimizer.state.clear()
        ends, steps = time.monotonic() + round_s - site.batch / site.speeds[site.peer] / 2, 0
        while steps == 0 or time.monotonic() < ends:  # to the nearest step
            site.step(optimizer=optimizer)
            steps += 1
        return site.weights(), steps * site.batch, {}


class Rounds(FedAvgM):
    def initialize_parameters(self, client_manager):
        client_manager.wait_for(len(site.names))
        return super().initialize_parameters(client_manager)


def train() -> None:
    while True:  # again where the server is not there yet, or no more
        with suppress(grpc.RpcError):
            start_client(server_address=address, client=Peer().to_client())
        time.sleep(0.5)


def serve() -> None:
    strategy = Rounds(
        fraction_evaluate=0.0,
        initial_parameters=ndarrays_to_parameters(site.weights()),
        server_learning_rate=float(site.options.get("server_rate", 1.0)),
        server_momentum=float(site.options.get("server_momentum", 0.0)),
    )
    start_server(server_address=address, config=ServerConfig(num_rounds=10**9), strategy=strategy)


if site.rank:
    train()
else:
    threading.Thread(target=train, daemon=True).start()
    serve()  # in the main thread: it sets signal handlers
