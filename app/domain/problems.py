"""The one error that work on a model or dataset ends with, told so that a person can act on it."""

import errno

from pydantic import BaseModel

# What an OSError says where a disk, or what its user may have of it, is full.
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})


class Problem(BaseModel):
    """What happened, where, and what to do next; the `error` of every resource."""

    code: str
    message: str
    hint: str | None = None
    # The last lines of the child process that ended without a word of its own.
    log_tail: str | None = None


class Note(BaseModel):
    """A finding that does not fail anything but that the reader of a result should know."""

    code: str
    message: str


class WorkError(Exception):
    """Work cannot go on, for a cause that the user can understand.

    `code` is stable and snake_case; `message` says what happened and where (file, layer, field,
    variant); `hint` says what to do next.
    """

    def __init__(self, code: str, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint
        self.log_tail: str | None = None
        # Whether the same work would end so again: by a finding, not by what befell the process.
        self.final = False

    def problem(self) -> Problem:
        return Problem(code=self.code, message=self.message, hint=self.hint, log_tail=self.log_tail)
