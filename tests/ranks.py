"""Run a function in several processes that talk over gloo."""

import os
import sys
import tempfile
import traceback

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _enter(rank, size, function, arguments, folder):
    # As torchrun tells transformers and accelerate. Nobody listens on the port: the ranks meet in
    # a file.
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ |= {name: str(value) for name, value in names.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    try:
        torch.save(function(*arguments), f"{folder}/result{rank}")
    except BaseException:
        traceback.print_exc(file=sys.stderr)
        raise
    finally:
        dist.destroy_process_group()


def _enter_alone(_, function, arguments, file):
    torch.set_num_threads(1)
    torch.save(function(*arguments), file)


def alone(function, *arguments):
    """What ``function(*arguments)`` returned in a new process without a process group."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_enter_alone, (function, arguments, f"{folder}/result"), nprocs=1)
        return torch.load(f"{folder}/result", weights_only=True)


def run(function, *arguments, size=2):
    """What ``function(*arguments)`` returned on every rank, by rank.

    The function must be at a module's top level.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_enter, (size, function, arguments, folder), nprocs=size)
        return [torch.load(f"{folder}/result{rank}", weights_only=True) for rank in range(size)]
