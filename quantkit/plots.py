"""Plots as SVG text, by matplotlib, to stand inside a page of any colours.

Colours are CSS variables, so that one file is right in the light and in the dark: `--fg` for text and axes, `--line`
for the grid, `--bad` for limits, `--s1` to `--s8` for what is shown. Text stays text. The same figures give the same
bytes: ids come from a fixed salt, and there is no date. `standalone` adds the colours, for a file of its own.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from quantkit.errors import MissingError

INSTALL = "pip install 'quantkit[report]'"
# What matplotlib is told to draw in, and what stands in the file then.
FOREGROUND, GRID, BAD = "#000001", "#000002", "#000003"
SERIES = tuple(f"#00001{n}" for n in range(1, 9))
VARIABLES = {
    FOREGROUND: "var(--fg)",
    GRID: "var(--line)",
    BAD: "var(--bad)",
    **{colour: f"var(--s{n})" for n, colour in enumerate(SERIES, 1)},
}
MARKERS = "os^Dv<>P"
WIDTH = 5.0  # inches: small enough that text is still read when a page is as narrow as a telephone
LONGEST = 28  # characters of a name in a plot
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "quantkit",
    "text.parse_math": False,  # a name may hold a dollar sign
    "font.size": 8.5,
    "text.color": FOREGROUND,
    "axes.labelcolor": FOREGROUND,
    "axes.edgecolor": FOREGROUND,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": FOREGROUND,
    "ytick.color": FOREGROUND,
    "figure.facecolor": "none",
    "figure.constrained_layout.use": True,
    "legend.frameon": False,
    "legend.fontsize": 8,
}
# The page's colours, light and dark: each at least 3 to 1 against its background, text 7 to 1.
LIGHT = {
    "bg": "#ffffff",
    "fg": "#1c2024",
    "muted": "#59626b",
    "line": "#dde1e5",
    "soft": "#f4f6f8",
    "good": "#0b6e3f",
    "bad": "#b3261e",
    "warn": "#8a5300",
}
DARK = {
    "bg": "#14171a",
    "fg": "#e8eaed",
    "muted": "#a3acb5",
    "line": "#343a40",
    "soft": "#1d2226",
    "good": "#6fd6a2",
    "bad": "#ff8f85",
    "warn": "#f0b65a",
}
_LIGHT_SERIES = ("#1f6fc4", "#c2570c", "#0d8a63", "#a83f92", "#8a6d00", "#5a55c9", "#0a8296", "#6e6259")
_DARK_SERIES = ("#6cb2ff", "#ff9d5c", "#4fd1a5", "#e88bd4", "#e0c04a", "#a5a1ff", "#56cfe1", "#c2b5ab")
LIGHT |= {f"s{n}": colour for n, colour in enumerate(_LIGHT_SERIES, 1)}
DARK |= {f"s{n}": colour for n, colour in enumerate(_DARK_SERIES, 1)}


def available() -> bool:
    """Whether matplotlib is there."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


@contextmanager
def _figure(width: float, height: float, rows: int = 1, **shared: Any) -> Iterator[tuple[Any, list[str]]]:
    """A figure's axes to draw on, and a list that its SVG is put in. Raises MissingError without matplotlib."""
    try:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingError(f"plots need matplotlib: {INSTALL}") from None
    drawn: list[str] = []
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height))
        FigureCanvasSVG(figure)
        yield figure.subplots(rows, squeeze=False, **shared)[:, 0], drawn
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        drawn.append(_inline(buffer.getvalue()))


def _inline(svg: str) -> str:
    """matplotlib's file as an element of a page: no prologue, no addresses, no ids but those that are referred to."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<defs>\s*</defs>", "", svg, flags=re.S)
    svg = re.sub(r'(<g) id="[^"]*"', r"\1", svg)
    root, _, rest = svg.partition(">")
    svg = re.sub(r' (xmlns(:\w+)?|version|width|height)="[^"]*"', "", root) + ">" + rest
    svg = svg.replace("xlink:href", "href").replace("'DejaVu Sans', ", "").replace("'Bitstream Vera Sans', ", "")
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px system-ui, sans-serif", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, variable)
    return re.sub(r"\s*\n\s*", "\n", svg)


def colours(values: Mapping[str, str]) -> str:
    """CSS that sets the variables."""
    return " ".join(f"--{name}: {value};" for name, value in values.items())


def standalone(svg: str) -> str:
    """The same as a file of its own."""
    style = f"svg {{ {colours(LIGHT)} background: var(--bg); }}"
    style += f" @media (prefers-color-scheme: dark) {{ svg {{ {colours(DARK)} }} }}"
    found = svg.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    head, _, rest = found.partition(">")
    return f'<?xml version="1.0" encoding="utf-8"?>\n{head}>\n<style>{style}</style>{rest}'


# Plots ----------------------------------------------------------------------------------------------------------------


def errors(by_kind: Mapping[str, Mapping[int, float]]) -> str:
    """Relative error against the number of the block, a line a kind of linear. Errors of 0 are left out."""
    with _figure(WIDTH, 3.1) as ((axes,), drawn):
        for n, (kind, found) in enumerate(by_kind.items()):
            points = [(block, error) for block, error in sorted(found.items()) if error > 0 and math.isfinite(error)]
            colour, marker = SERIES[n % len(SERIES)], MARKERS[(n + n // len(SERIES)) % len(MARKERS)]
            axes.plot(
                *zip(*points), color=colour, marker=marker, markersize=3.5, linewidth=1.1, label=kind
            ) if points else 0
        axes.set(xlabel="block", ylabel="relative squared error")
        _logarithmic(axes)
        _whole_numbers(axes)
        axes.figure.legend(loc="outside lower center", ncols=3)
    return drawn[0]


def windows(values: Sequence[float], limit: float | None) -> str:
    """The KL divergence of each window, their mean, and the gate's limit."""
    with _figure(WIDTH, 2.3) as ((axes,), drawn):
        axes.plot(range(1, len(values) + 1), values, "o", color=SERIES[0], markersize=3.5, label="a window")
        axes.axhline(sum(values) / len(values), color=SERIES[0], linewidth=1.3, label="their mean")
        if limit is not None:
            axes.axhline(limit, color=BAD, linewidth=1.3, linestyle="--", label="the gate's limit")
        axes.set(xlabel="window", ylabel="KL divergence, nats a token")
        axes.set_ylim(bottom=0)
        _whole_numbers(axes)
        axes.figure.legend(loc="outside lower center", ncols=3)
    return drawn[0]


def recovery(found: Sequence[tuple[str, Mapping[str, Any], float | None]]) -> str:
    """Bounds of what is recovered of each score: (name, interval, limit of its gate)."""
    with _figure(WIDTH, 0.7 + 0.3 * len(found)) as ((axes,), drawn):
        for y, (_, x, limit) in enumerate(reversed(found)):
            middle, low, high = (100 * x[key] for key in ("value", "low", "high"))
            axes.plot([low, high], [y, y], color=SERIES[0], linewidth=2.5, solid_capstyle="butt")
            axes.plot([middle], [y], "o", color=SERIES[0], markersize=6)
            if limit is not None:
                axes.plot([100 * limit] * 2, [y - 0.35, y + 0.35], color=BAD, linewidth=1.6, linestyle="--")
        axes.axvline(100, color=FOREGROUND, linewidth=0.8)
        axes.set_yticks(range(len(found)), [_short(name) for name, *_ in reversed(found)])
        axes.set(xlabel="% of the original's score", ylim=(-0.6, len(found) - 0.4))
        axes.grid(visible=False, axis="y")
    return drawn[0]


def blocks(by_block: Mapping[str, Mapping[str, int]]) -> str:
    """Bytes and bits a weight of each block and of what is in none, original and output."""
    numbers = [number for number in by_block if number]
    with _figure(WIDTH, 3.8, 2, sharex=True) as ((above, below), drawn):
        places = [int(number) for number in numbers]
        rest = max(places, default=-1) + 2 if "" in by_block else None
        at = [*places, *([rest] if rest is not None else [])]
        rows = [*(by_block[number] for number in numbers), *([by_block[""]] if rest is not None else [])]
        for shift, key, colour, name in (
            (-0.2, "source_bytes", SERIES[7], "original"),
            (0.2, "output_bytes", SERIES[0], "output"),
        ):
            above.bar([x + shift for x in at], [row[key] / 1e6 for row in rows], 0.38, color=colour, label=name)
            bits = [8 * row[key] / row["weights"] if row["weights"] else math.nan for row in rows]
            below.bar([x + shift for x in at], bits, 0.38, color=colour)
        above.set(ylabel="MB")
        below.set(xlabel="block", ylabel="bits a weight")
        every = max(1, len(places) // 16)
        ticks = {x: str(x) for x in places[::every]} | ({} if rest is None else {rest: "none"})
        below.set_xticks([*ticks], [*ticks.values()])
        for axes in (above, below):
            axes.grid(visible=False, axis="x")
        above.figure.legend(loc="outside lower center", ncols=2)
    return drawn[0]


def size_against_kl(found: Sequence[Mapping[str, Any]]) -> str:
    """A point an output: bytes, KL divergence with bounds of 95 % to either side."""
    with _figure(WIDTH, 3.4) as ((axes,), drawn):
        for n, x in enumerate(found):
            look = {"color": SERIES[n % len(SERIES)], "marker": MARKERS[(n + n // len(SERIES)) % len(MARKERS)]}
            error = 1.645 * (x["kl_stderr"] or 0)
            bars = axes.errorbar(
                x["bytes"] / 1e6, x["kl"], yerr=error, linestyle="none", capsize=3, markersize=5.5, **look
            )
            bars.set_label(_short(x["name"]))
        axes.set(xlabel="size of all tensors, MB", ylabel="KL divergence from the original, nats a token")
        _logarithmic(axes)
        axes.margins(x=0.1)
        axes.figure.legend(loc="outside lower center", ncols=2)
    return drawn[0]


def _logarithmic(axes: Any) -> None:
    """A logarithmic scale of what spans more than a factor of ten, all above 0; plain numbers beside it."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    low, high = axes.dataLim.intervaly
    if low > 0 and high > 10 * low:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _short(name: str) -> str:
    """A name that leaves room for the plot."""
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"


def _whole_numbers(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
