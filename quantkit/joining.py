"""How ranks come together: what a launcher put into the environment, a store where all meet, process groups.

with joined() as ranks: ...        alone without a launcher; then torch is not imported
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from quantkit.errors import InputError, MissingError, QuantkitError
from quantkit.heartbeat import Heartbeat
from quantkit.ranks import ALONE, Ranks

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
JOIN = timedelta(minutes=5)  # for all ranks to be there; launchers meet before they start them
PATIENCE = timedelta(days=30)  # a rank may wait for another's work: the heartbeat says when one is dead


@contextmanager
def joined(device: str = "auto") -> Iterator[Ranks]:
    """The ranks that torchrun (or accelerate launch) started, for as long as this lasts; alone without a launcher.

    device  "auto", "cpu" or "cuda": on GPUs, each rank gets that of its LOCAL_RANK
    An error on any rank ends all of them within seconds; it is raised, to be told, on one rank that has it, and on
    the others SystemExit with the same code. Raises InputError or MissingError for ranks that cannot come together.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield ALONE
        return
    rank, size = _numbers()
    ranks, ours = _join(rank, size, device)
    heartbeat = ranks.heartbeat
    assert heartbeat is not None
    try:
        with heartbeat:
            yield ranks
            ranks.everyone(None)  # nobody leaves before all are done: the store may live in rank 0
    except BaseException as error:
        message = str(error) if isinstance(error, QuantkitError | SystemExit) else f"{type(error).__name__}: {error}"
        code = getattr(error, "exit_code", 130 if isinstance(error, KeyboardInterrupt) else 1)
        if isinstance(error, SystemExit) or not heartbeat.report(code, message):
            raise SystemExit(error.code if isinstance(error, SystemExit) else code) from error
        raise
    if ours:
        import torch.distributed as dist

        dist.destroy_process_group()


def is_launched() -> bool:
    """Whether this process is one of several that a launcher started."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def leave(code: int) -> None:
    """Ends this process at once, as one of several: a collective that hangs must not hold it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _numbers() -> tuple[int, int]:
    """RANK and WORLD_SIZE. Raises InputError for what no launcher sets so."""
    missing = [name for name in VARIABLES if not os.environ.get(name)]
    world = os.environ["WORLD_SIZE"]
    advice = "start with torchrun --nproc-per-node N -m quantkit quantize RECIPE, or unset WORLD_SIZE"
    if missing:
        raise InputError(f"WORLD_SIZE is {world!r}, but {', '.join(missing)} is not set; {advice}")
    try:
        rank, size, _ = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    except ValueError:
        values = ", ".join(f"{name}={os.environ[name]!r}" for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
        raise InputError(f"{values}: not whole numbers; {advice}") from None
    if not 0 <= rank < size:
        raise InputError(f"RANK is {rank} and WORLD_SIZE {size}; ranks go from 0 to WORLD_SIZE - 1; {advice}")
    return rank, size


def _join(rank: int, size: int, device: str) -> tuple[Ranks, bool]:
    """Meets the others, and whether the process group is ours to destroy."""
    import torch
    import torch.distributed as dist

    gpu = device != "cpu" and torch.cuda.is_available()
    if gpu:
        local, count = int(os.environ.get("LOCAL_RANK", rank)), torch.cuda.device_count()
        if local >= count:
            raise MissingError(
                f"rank {rank} would be the {local + 1}th on this machine, which has {count} GPUs, one for each rank; "
                f"start with --nproc-per-node {count}, or use --device cpu"
            )
        torch.cuda.set_device(local)
    prefix, store = _meet(rank, size)
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpu else "gloo",
            store=dist.PrefixStore("group", _store_of(prefix)),
            rank=rank,
            world_size=size,
            timeout=PATIENCE,
        )
    # Groups of our own, whatever the group of the program around us can carry, and without its time limit.
    host = dist.new_group(backend="gloo", timeout=PATIENCE)
    on_gpu = dist.new_group(backend="nccl", timeout=PATIENCE) if gpu else host
    if gpu:
        dist.broadcast(torch.zeros(1, device="cuda"), 0, group=on_gpu)  # all of them, before any two talk
    return Ranks(rank, size, host, on_gpu, Heartbeat(_store_of(prefix), rank, size), store), ours


def _meet(rank: int, size: int) -> tuple[str, Any]:
    """Waits until all ranks are there: the store, and a prefix of keys in it for this run of this attempt alone.

    Raises MissingError when one does not come.
    """
    import torch.distributed as dist

    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" or dist.is_initialized()  # by the launcher
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store = _connect(rank == 0 and not hosted)
        run = store.add(f"quantkit/{attempt}/runs/{rank}", 1)
        prefix = f"quantkit/{attempt}/{run}"
        store.set(f"{prefix}/here/{rank}", "1")
    except (RuntimeError, OSError) as e:
        raise MissingError(
            f"rank {rank} does not reach the launcher's store at {place} (MASTER_ADDR:MASTER_PORT): "
            f"{' '.join(str(e).split())[:200]}"
        ) from None
    here = [f"{prefix}/here/{other}" for other in range(size)]
    try:
        store.wait(here, JOIN)
    except (RuntimeError, OSError):
        absent = [str(other) for other in range(size) if not store.check([here[other]])]
        raise MissingError(
            f"of {size} ranks, {', '.join(absent)} did not come to {place} within {JOIN}; start all of them, "
            "or unset WORLD_SIZE to quantize with one process"
        ) from None
    return prefix, store


def _store_of(prefix: str) -> Any:
    """A store with a connection of its own: one that waits for a key holds up all who share its connection."""
    import torch.distributed as dist

    return dist.PrefixStore(prefix, _connect())


def _connect(serve: bool = False) -> Any:
    import torch.distributed as dist

    place = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    return dist.TCPStore(*place, None, serve, timeout=JOIN, wait_for_workers=False)
