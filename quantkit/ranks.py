"""Several processes that quantize one model together, as `torchrun` starts them: what they tell each other.

    rank 0       reads the calibration data, writes the output, validates it, prints
    every rank   runs its own batches of rows through each block; has the statistics of some of its inputs, to which all
                 send what they see of them, and solves the matrices that read those

One GPU a rank and NCCL, or the CPU and gloo; small things always go by gloo. Nothing is summed on the way: who adds up
adds the same numbers in the same order as one process would, so the bytes do not depend on the number of ranks.

`joining` brings them together, `heartbeat` ends all when one fails. torch is imported only with more than one rank.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from quantkit.errors import InputError
from quantkit.heartbeat import Heartbeat

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
BUCKET = 1 << 26  # bytes: smaller tensors travel together
LOAD = 1 << 28  # bytes on their way at once
ALIGNED = 512  # bytes, as torch aligns tensors: where one lies can decide by which kernel it is multiplied, so its bits


@dataclass(frozen=True)
class Ranks:
    """This process among `size`; alone, every exchange is nothing at all.

    host, device  process groups for tensors on the CPU and on the device
    store         where they met; rank 0 serves it where the launcher does not
    """

    rank: int = 0
    size: int = 1
    host: Any = None
    device: Any = None
    heartbeat: Heartbeat | None = None
    store: Any = None

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes and prints."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.size == 1

    def share(self, things: Iterable[T]) -> list[T]:
        """This rank's part: one of each `size`, as cards are dealt."""
        return list(things)[self.rank :: self.size]

    def everyone(self, value: Any) -> list[Any]:
        """What each rank has, in their order: plain values that JSON holds (floats come through exactly)."""
        if self.alone:
            return [value]
        import torch
        import torch.distributed as dist

        raw = json.dumps(value).encode()
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with self._talking():
            dist.all_gather(sizes, torch.tensor([len(raw)]), group=self.host)
            longest = max(int(size) for size in sizes)
            mine = torch.frombuffer(bytearray(raw.ljust(longest)), dtype=torch.uint8)
            found = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
            dist.all_gather(found, mine, group=self.host)
        return [json.loads(bytes(text.tolist()[: int(size)])) for text, size in zip(found, sizes, strict=True)]

    def told(self, value: Any = None) -> Any:
        """Rank 0's value, on every rank; as plain as in `everyone`. The others wait for as long as it takes."""
        if self.alone:
            return value
        import torch
        import torch.distributed as dist

        raw = json.dumps(value).encode() if self.first else b""
        size = torch.tensor([len(raw)])
        with self._talking():
            dist.broadcast(size, 0, group=self.host)
            text = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.empty(int(size)).byte()
            dist.broadcast(text, 0, group=self.host)
        return json.loads(bytes(text.tolist()))

    def agree(self, what: str, value: Mapping[str, Any]) -> None:
        """Raises InputError unless all ranks have the same values; names the first that differs."""
        for rank, other in enumerate(self.everyone(dict(value))):
            for key in value:
                if other[key] != value[key]:
                    raise InputError(
                        f"rank {self.rank} and rank {rank} have not the same {what}: {key} is {value[key]!r} on one "
                        f"and {other[key]!r} on the other; start all ranks with the same command"
                    )

    def largest(self, tensors: Iterable[torch.Tensor]) -> None:
        """The largest of each element over the ranks, in place."""
        if self.alone:
            return
        import torch
        import torch.distributed as dist

        for bucket in _buckets(tensors):
            flat = torch.cat([t.reshape(-1) for t in bucket])
            with self._talking():
                dist.all_reduce(flat, dist.ReduceOp.MAX, group=self._group(flat.device))
            _put_back(flat, bucket)

    def deliver(
        self, parcels: Sequence[Parcel], device: torch.device | str
    ) -> Iterator[tuple[int, int, list[torch.Tensor]]]:
        """Sends parcels, and gives those that are addressed to this rank: number, source, tensors.

        In the order of their numbers; of one number, in that of the ranks, and as each rank listed them. All ranks
        call this together, and take all that it gives. Tensors are contiguous, on `device`.
        """
        if self.alone:
            yield from ((p.number, 0, list(p.tensors)) for p in sorted(parcels, key=lambda p: p.number))
            return
        import torch.distributed as dist

        listed = self.everyone([[p.number, list(p.to), [_spec(t) for t in p.tensors]] for p in parcels])
        jobs = [(n, rank, i, to, specs) for rank, one in enumerate(listed) for i, (n, to, specs) in enumerate(one)]
        for bucket in _loads(sorted(jobs, key=lambda job: job[:3])):
            ops: list[Any] = []
            arrived = []
            for number, source, i, to, specs in bucket:
                if self.rank not in (source, *to):
                    continue
                tensors = list(parcels[i].tensors) if source == self.rank else [_blank(x, device) for x in specs]
                peers = [rank for rank in to if rank != self.rank] if source == self.rank else [source]
                call = dist.isend if source == self.rank else dist.irecv
                group = self._group(device)
                ops += [dist.P2POp(call, t, peer, group, tag=0) for peer in peers for t in tensors if t.numel()]
                if self.rank in to:
                    arrived.append((number, source, tensors))
            with self._talking():
                for request in dist.batch_isend_irecv(ops) if ops else ():
                    request.wait()
            yield from arrived

    def spread(
        self, owned: Mapping[int, Sequence[torch.Tensor]], device: torch.device | str
    ) -> list[list[torch.Tensor]]:
        """Numbered lists of tensors, each known to one rank, on every rank: by their numbers, 0, 1, 2, ...

        owned   those of this rank, on `device`
        """
        if self.alone:
            return [list(owned[i]) for i in sorted(owned)]
        import torch
        import torch.distributed as dist

        shapes = {i: [_spec(t) for t in x] for i, x in owned.items()}
        found: dict[int, list[torch.Tensor]] = {}
        for rank, listed in enumerate(self.everyone(shapes)):
            specs = {int(i): [(getattr(torch, d), tuple(s)) for d, s in x] for i, x in listed.items()}
            places, size = _places(specs)
            if not size:
                found |= {i: [torch.empty(s, dtype=d, device=device) for d, s in x] for i, x in specs.items()}
                continue
            flat = torch.zeros(size, dtype=torch.uint8, device=device)
            parts = {
                i: [flat[at : at + n].view(d).view(s) for (d, s), (at, n) in zip(x, places[i], strict=True)]
                for i, x in specs.items()
            }
            if rank == self.rank:
                for i, x in owned.items():
                    for place, tensor in zip(parts[i], x, strict=True):
                        place.copy_(tensor)
            with self._talking():
                dist.broadcast(flat, rank, group=self._group(flat.device))
            found |= parts
        return [found[i] for i in sorted(found)]

    def _group(self, device: torch.device | str) -> Any:
        return self.host if str(device) == "cpu" else self.device

    @contextmanager
    def _talking(self) -> Iterator[None]:
        """Turns a connection that breaks into the reason that the rank at its other end gave."""
        import torch

        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as e:
            assert self.heartbeat is not None
            self.heartbeat.lost(" ".join(str(e).split())[:200])


ALONE = Ranks()


@dataclass(frozen=True)
class Parcel:
    """Tensors on their way. number: what they are; to: ranks, of which the sender may be one."""

    number: int
    to: Sequence[int]
    tensors: Sequence[torch.Tensor]


def assign(costs: Sequence[float], size: int, busy: float = 0.0) -> list[int]:
    """The rank of each piece of work: the longest first, each to the rank that has least so far.

    busy  what rank 0 has to do besides
    """
    load = [busy, *[0.0] * (size - 1)]
    owner = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owner[i] = load.index(min(load))
        load[owner[i]] += costs[i]
    return owner


def _buckets(tensors: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Tensors of one dtype and device together, in their order, up to BUCKET bytes; larger ones alone."""
    alike: dict[Any, list[torch.Tensor]] = {}
    for t in tensors:
        alike.setdefault((t.dtype, t.device), []).append(t)
    for group in alike.values():
        bucket: list[torch.Tensor] = []
        for t in group:
            if bucket and sum(b.nbytes for b in bucket) + t.nbytes > BUCKET:
                yield bucket
                bucket = []
            bucket.append(t)
        yield bucket


def _spec(t: torch.Tensor) -> tuple[str, list[int]]:
    return str(t.dtype).removeprefix("torch."), list(t.shape)


def _blank(spec: tuple[str, list[int]], device: torch.device | str) -> torch.Tensor:
    import torch

    return torch.empty(spec[1], dtype=getattr(torch, spec[0]), device=device)


def _loads(jobs: Iterable[tuple[int, int, int, list[int], list[Any]]]) -> Iterator[list[Any]]:
    """Jobs of `deliver`, in their order, a few hundred megabytes at a time."""
    import torch

    load: list[Any] = []
    size = 0
    for job in jobs:
        load.append(job)
        for dtype, shape in job[4]:
            size += math.prod(shape) * getattr(torch, dtype).itemsize
        if size > LOAD:
            yield load
            load, size = [], 0
    if load:
        yield load


def _put_back(flat: torch.Tensor, bucket: Sequence[torch.Tensor]) -> None:
    at = 0
    for t in bucket:
        if t.data_ptr() != flat.data_ptr():
            t.copy_(flat[at : at + t.numel()].view(t.shape))
        at += t.numel()


def _places(specs: Mapping[int, Sequence[tuple[Any, tuple[int, ...]]]]) -> tuple[dict[int, list[tuple[int, int]]], int]:
    """Where each tensor lies among bytes: first byte and length; and the length of all."""
    places: dict[int, list[tuple[int, int]]] = {}
    at = 0
    for i in sorted(specs):
        places[i] = []
        for dtype, shape in specs[i]:
            count = dtype.itemsize * math.prod(shape)
            places[i].append((at, count))
            at += -(-count // ALIGNED) * ALIGNED
    return places, at
