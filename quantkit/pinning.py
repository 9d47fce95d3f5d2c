"""A recipe with the exact commits of what it names on the Hub: no branch moves under a run, nor before the next one.

The commits are settled before anything is read, and stand in the recipe beside the weights and in quantkit.json.
"""

from __future__ import annotations

from typing import TypeVar

from quantkit import calibration
from quantkit.hub import Source
from quantkit.recipe import Recipe
from quantkit.recipe.calibration import TextSource

Texts = TypeVar("Texts", bound=TextSource)


def pinned(recipe: Recipe, source: Source) -> Recipe:
    """The recipe with commits for its model, found as `source`, and for its data sets on the Hub.

    Raises InputError for a data set that is not there, MissingError when the Hub cannot be asked.
    """
    changes = {"model": source.pinned, "calibration": texts(recipe.calibration)}
    if recipe.validation is not None:
        held_out = texts(recipe.validation.perplexity)
        changes["validation"] = recipe.validation.model_copy(update={"perplexity": held_out})
    return recipe.model_copy(update=changes)


def texts(wanted: Texts) -> Texts:
    """Texts with the commit of their data set; as they are when they are not on the Hub."""
    commit = calibration.pin(wanted.data, subset=wanted.subset, split=wanted.split, revision=wanted.revision)
    if commit is None:
        return wanted
    return wanted.model_copy(update={"data": wanted.data.partition("@")[0], "revision": commit})
