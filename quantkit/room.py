"""What the weights of a Hub model take of the disk, fetched all at once or each deleted after use."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from quantkit.errors import MissingError
from quantkit.plan import Plan


def fetched(plan: Plan) -> tuple[int, int]:
    """Bytes of a Hub model that are not in the cache yet, and the most that are there at once with --delete-shards."""
    shards = plan.source.shards
    if shards is None:
        return 0, 0
    steps = plan.skeleton.checkpoint.in_shards(plan.reading)
    return shards.missing({name for step in steps for name in step}), shards.most(steps)


def said(plan: Plan) -> list[tuple[str, str]]:
    """What a model of the Hub takes of the disk, in words."""
    output, (whole, most) = plan.output_bytes, fetched(plan)
    if plan.source.shards is None:
        return []
    return [
        ("to fetch", f"{whole:,} bytes of weights; what else there is of them is in the cache"),
        ("  disk", f"{output + whole:,} bytes with the output, all of it in the cache at the end"),
        ("  --delete-shards", f"{output + most:,} bytes with the output, none left in the cache at the end"),
    ]


def check(plan: Plan, out: Path) -> None:
    """Raises MissingError when the disk has no room for what is to be fetched, with the output where both are on it."""
    shards = plan.source.shards
    if shards is None:
        return
    whole, most = fetched(plan)
    cache, place = plan.source.folder, next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    both = os.stat(cache).st_dev == os.stat(place).st_dev
    output = plan.output_bytes if both else 0
    need, free = output + (most if shards.delete else whole), shutil.disk_usage(cache).free
    if need > free:
        advice = "" if shards.delete else f"; or use --delete-shards, which takes {output + most:,} bytes"
        raise MissingError(
            f"{cache}: {free:,} bytes are free, and {need:,} are needed for the weights{' and the output' * both}; "
            f"free some, or set HF_HUB_CACHE to a larger disk{advice}"
        )
