"""NVIDIA FLARE, FedAvg: a provisioned deployment with mutual TLS. The server and a client in the first peer's host, one
client in each of the others; kits, certificates and start.sh as its provisioning makes them, the job from its Job API.

The script trains inside the client's job process, the Client API's default mode. In a round all clients train for the
same time, as many steps as fit, and count by their steps: nobody waits for the slow, other than for their links. Waits
that a federation over hours would not notice are cut down to what rounds of seconds need: 2 s between two tasks, 660 s
until a client counts as dead; and weights come inside the message (``chunk`` 0) instead of being asked for in pieces.

It puts itself into a process namespace: FLARE's processes, two per host and two more for the server, end with it.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from rivals import settings

DEFAULTS = {"round_s": "5", "scheme": "tcp", "dead_s": "15", "port": "8002", "chunk": "0"}
ADMIN = "admin@lab.org"


def provision(kits, peers, addresses, options):
    """Startup kits of all, moved to ``kits`` when they are complete."""
    from nvflare.lighter.entity import Project
    from nvflare.lighter.impl.cert import CertBuilder
    from nvflare.lighter.impl.signature import SignatureBuilder
    from nvflare.lighter.impl.static_file import StaticFileBuilder
    from nvflare.lighter.impl.workspace import WorkspaceBuilder
    from nvflare.lighter.provisioner import Provisioner

    project = Project("lab", "dlion's hosts")
    host = {"default_host": addresses[peers[0]], "fed_learn_port": int(options["port"])}
    project.set_server("server", "lab", host)
    for peer in peers:
        project.add_client(peer, "lab", {})
    project.add_admin(ADMIN, "lab", {"role": "project_admin"})
    static = StaticFileBuilder(config_folder="config", scheme=options["scheme"])
    builders = [WorkspaceBuilder(["master_template.yml"]), static, CertBuilder(), SignatureBuilder()]
    made = Path(Provisioner(str(kits.parent), builders).provision(project).get("current_prod_dir"))
    local = made / "server" / "local"
    resources = (local / "resources.json.default").read_text().replace("/tmp/nvflare", str(kits.parent))
    resources = resources.replace('"heart_beat_timeout": 600', f'"heart_beat_timeout": {options["dead_s"]}')
    (local / "resources.json").write_text(resources)
    made.rename(kits)


def submit(out, kits, peers, options):
    """FedAvg from the job's own starting weights, when all clients are there."""
    import torch
    from kit import Site
    from nvflare.app_common.workflows.fedavg import FedAvg
    from nvflare.app_opt.pt.file_model_persistor import PTFileModelPersistor
    from nvflare.app_opt.pt.job_config.base_fed_job import BaseFedJob
    from nvflare.fuel.flare_api.flare_api import new_secure_session
    from nvflare.job_config.script_runner import ScriptRunner

    initial = kits.parent / "initial.pt"
    torch.save(Site(out, peers[0]).model.state_dict(), initial)
    job = BaseFedJob(name="fedavg", min_clients=1, key_metric="")
    job.to_server(PTFileModelPersistor(source_ckpt_file_full_name=str(initial)), id="persistor")
    job.to_server(FedAvg(num_clients=len(peers), num_rounds=100_000, task_check_period=0.1))
    waits = {"dead_client_grace_period": 0.0, "dead_client_check_lead_time": 1.0}
    chunk = {"np_download_chunk_size": int(options["chunk"])}
    job.to_server(chunk | waits | {"server": {"task_request_interval": 0.1}})
    job.to_clients(chunk)
    job.to_clients(ScriptRunner(script=__file__, script_args=str(out)))
    job.export_job(str(kits.parent / "jobs"))
    session = new_secure_session(ADMIN, str(kits / ADMIN), timeout=60.0)
    while len(session.get_system_info().client_info) < len(peers):
        time.sleep(0.5)
    session.submit_job(str(kits.parent / "jobs" / "fedavg"))
    session.close()


def host(out, peer):
    """The peer's client; in the first peer's host also the server and the administrator. Until the trainer ends."""
    said = settings(out)
    peers, options = list(said["addresses"]), DEFAULTS | said["options"]
    kits, trainer = out / "flare" / "kits", out / "flare" / f"{peer}.pid"
    first = {"PATH": Path(sys.executable).parent, "PYTHONPATH": Path(__file__).parent}
    environment = os.environ | {name: f"{path}:{os.environ.get(name, '')}" for name, path in first.items()}
    if peer == peers[0]:
        provision(kits, peers, said["addresses"], options)
        subprocess.run([kits / "server" / "startup" / "start.sh"], env=environment, check=True)
    while not kits.exists():
        time.sleep(0.1)
    subprocess.run([kits / peer / "startup" / "start.sh"], env=environment, check=True)
    if peer == peers[0]:
        submit(out, kits, peers, options)
    while not trainer.exists() or Path("/proc", trainer.read_text()).exists():
        time.sleep(0.1)


def train(out):
    """What each client runs: rounds of local SGD, between which its view is the global model."""
    import nvflare.client as flare
    import torch
    from kit import Site
    from nvflare.app_common.abstract.fl_model import FLModel

    flare.init()
    site = Site(out, flare.get_site_name())
    options = DEFAULTS | site.options
    steps = max(1, int(float(options["round_s"]) * site.speeds[site.peer] / site.batch))
    optimizer = torch.optim.SGD(site.model.parameters(), lr=site.rate, momentum=site.momentum)
    initial = site.weights()
    site.view = lambda: initial
    (out / "flare" / f"{site.peer}.pid").write_text(str(os.getpid()))
    site.go()
    while flare.is_running():
        site.model.load_state_dict(flare.receive().params)
        received = site.weights()
        site.view = lambda received=received: received
        for _ in range(steps):
            site.step(optimizer=optimizer)
        flare.send(FLModel(params=site.model.state_dict(), meta={"NUM_STEPS_CURRENT_ROUND": steps}))


if len(sys.argv) < 3:
    train(Path(sys.argv[1]))
elif os.getpid() != 1:
    words = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", sys.executable, *sys.argv]
    os.execvp(words[0], words)
else:
    host(Path(sys.argv[1]), sys.argv[2])
