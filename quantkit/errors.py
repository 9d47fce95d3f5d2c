"""The errors a user can meet, and the exit code of each.

Every message says what is wrong, where (file, key or layer), the measured value, and what to do about it.
The command line prints the message alone, without a traceback, and exits with `exit_code`.
"""


class QuantkitError(Exception):
    """Base of every error that quantkit raises on purpose."""

    exit_code = 2


class InputError(QuantkitError):
    """Bad usage, recipe, model, checkpoint or data: nothing on this machine can make it work. Exit code 2."""


class GateError(QuantkitError):
    """The output was written, but its validation missed a gate. Exit code 3."""

    exit_code = 3


class MissingError(QuantkitError):
    """Something this machine lacks: a package, a GPU, room on a disk, the right to write. Exit code 4."""

    exit_code = 4


class Interrupted(QuantkitError):
    """The run was asked to end, and did so between two steps. Exit code 130."""

    exit_code = 130
