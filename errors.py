"""Errors that a user can cause: one clear message, one exit code, no traceback.

A message says what is wrong, the value found, the limit, and the way out. `train.py` prints it and exits
with `exit_code`; anything that is not a `UserError` is a defect of ours and keeps its traceback.
"""

from __future__ import annotations


class UserError(Exception):
    """Base of every error that the user can mend."""

    exit_code = 1


class UsageError(UserError):
    """A recipe, an option, the topology or the environment is wrong."""

    exit_code = 2


class DataError(UserError):
    """Text, tokens or tokenizer cannot be used; names the file and the offset."""

    exit_code = 3


class CheckpointError(UserError):
    """A checkpoint cannot be written, or is not the one that this run can load."""

    exit_code = 4


class StuckError(UserError):
    """The run does not get on by itself: started again from its newest checkpoint it would end the same way."""

    exit_code = 5
