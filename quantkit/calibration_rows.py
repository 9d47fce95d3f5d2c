"""The rows of tokens that a plan is calibrated on: read once, reported, and checked against the model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from quantkit import calibration
from quantkit.errors import InputError
from quantkit.plan import Plan, tokenizer
from quantkit.progress import Progress


def read(plan: Plan, progress: Progress, texts: Iterable[Any] | None = None) -> calibration.Rows | None:
    """The calibration rows, or None for a method that needs none.

    texts  take the place of the recipe's calibration.data
    """
    if not plan.needs_data:
        if texts is not None:
            progress.warn("calibration_data is not read: this method and scheme observe nothing")
        return None
    wanted = plan.recipe.calibration
    if texts is None:
        place = {key: getattr(wanted, key) for key in ("subset", "split", "revision", "column")}
        source = calibration.open_source(wanted.data, **place)
    else:
        source = calibration.from_iterable(texts, wanted.column)
    rows = calibration.pack_rows(
        source,
        tokenizer(plan.source, trust_remote_code=plan.recipe.trust_remote_code),
        samples=wanted.samples,
        length=wanted.length,
        packing=wanted.packing,
        min_tokens=wanted.min_tokens,
        shuffle=wanted.shuffle,
        chat_template=wanted.chat_template,
        tokens=wanted.tokens,
    )
    vocabulary = plan.skeleton.model.get_input_embeddings().num_embeddings
    if int(rows.ids_RL.max()) >= vocabulary:
        raise InputError(
            f"{plan.source.folder}: the tokenizer gives token {int(rows.ids_RL.max())}, but the model has only "
            f"{vocabulary} embeddings; they do not belong together"
        )
    _tell(rows.report, source.name, max(x.shape[1] for x in plan.quantized), progress)
    return rows


def _tell(report: dict[str, Any], name: str, widest: int, progress: Progress) -> None:
    """The data report in a few lines, with a warning where there are fewer rows or tokens than it takes."""
    for line in calibration.said(report, name):
        progress.say(line)
    if report["rows"] < report["rows_wanted"]:
        progress.warn(
            f"calibration data {name} gives {report['rows']} rows of {report['length']} tokens, "
            f"not the {report['rows_wanted']} that the recipe asks for"
        )
    if report["counted_tokens"] < 4 * widest:
        progress.warn(
            f"only {report['counted_tokens']:,} calibration tokens for layers of {widest} inputs; below {4 * widest:,} "
            f"the statistics fit the calibration text more than the model, and {16 * widest:,} are better: raise "
            "calibration.samples or length"
        )


def noted(rows: calibration.Rows | None) -> dict[str, Any] | None:
    """What quantkit.json says of the rows; None without any."""
    return None if rows is None else {"sha256": rows.sha256, **rows.report}
