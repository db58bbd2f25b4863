"""Plain ``torch.distributed``: DistributedDataParallel over gloo, every step averaged, as its tutorial has it.

When a peer dies all others fail; here they keep what they have to the end.
"""

import logging
import os
import time

import torch
import torch.distributed as dist
from kit import here
from torch.nn.parallel import DistributedDataParallel

site = here()
os.environ |= {"MASTER_ADDR": site.addresses[site.names[0]], "MASTER_PORT": "29500", "GLOO_SOCKET_IFNAME": "wan0"}
dist.init_process_group("gloo", rank=site.rank, world_size=len(site.names))
site.model = DistributedDataParallel(site.model)
optimizer = torch.optim.SGD(site.model.parameters(), lr=site.rate, momentum=site.momentum)
site.go()
try:
    while True:
        site.step(optimizer=optimizer)
except RuntimeError:
    logging.exception("it ends here")
    time.sleep(3600)
