"""Patterns for layers' names, from recipes and from checkpoints: matched in bounded time, whatever they are.

A regular expression may take longer than anyone waits: `(\\w+\\.?)+!` tries 2^30 ways to read the name of a layer. `re`
cannot be told when to stop, `regex` can; what it takes is held to `re`'s dialect, which is what engines use.
"""

from __future__ import annotations

import functools
import math
import re

import regex

from quantkit.errors import InputError

SECONDS = 2.0  # a name; layers' own patterns take microseconds
REPEATS = 10_000  # `regex` writes x{100} out as it compiles
LENGTH = 4096
_COUNTS = re.compile(r"\{(\d*)(?:,(\d*))?\}")


class PatternError(ValueError):
    """Why a pattern cannot be used."""


@functools.lru_cache(maxsize=4096)
def compiled(pattern: str) -> regex.Pattern[str]:
    """A regular expression, checked. Raises PatternError with the reason."""
    if len(pattern) > LENGTH:
        raise PatternError(f"it has {len(pattern)} characters; {LENGTH} are the most")
    counts = [max(int(n[:9] or 1) for n in (low, high or "")) for low, high in _COUNTS.findall(pattern)]
    if math.prod(counts) > REPEATS:
        raise PatternError(f"its counts in braces multiply to {math.prod(counts)}; {REPEATS} are the most")
    try:
        re.compile(pattern)
        return regex.compile(pattern)
    except (re.error, regex.error, OverflowError) as error:
        raise PatternError(str(error)) from None
    except RecursionError:
        raise PatternError("it is nested too deeply") from None


def matches(pattern: str, name: str, *, anywhere: bool = False) -> bool:
    """Whether a regular expression matches a name from its start, or anywhere in it.

    Raises InputError for one that is not valid, or takes too long.
    """
    try:
        found = compiled(pattern)
        return (found.search if anywhere else found.match)(name, timeout=SECONDS) is not None
    except PatternError as error:
        raise InputError(f"{pattern[:100]!r} is not a valid regular expression: {error}") from None
    except TimeoutError:
        raise InputError(
            f"the pattern {pattern[:100]!r} takes more than {SECONDS:g} s to match {name[:100]!r}; write it without a "
            "repetition inside another"
        ) from None
