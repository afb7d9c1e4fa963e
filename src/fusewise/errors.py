"""The one exception tree. Every message says what was expected, what came, and what to do next.

This file never formats for a terminal and never decides an exit code's meaning beyond the table
below, which the command line returns as it is:

====  =======================================================================
code  meaning
====  =======================================================================
2     the call's words are off (unknown backend, size syntax, shape)
3     this machine cannot do that (backend unavailable, no shared memory)
4     ranks failed, died, disagreed or did not answer in time
5     a profile is broken, stale or belongs to another node
6     a result was wrong
130   interrupted
====  =======================================================================
"""

from __future__ import annotations


class FusewiseError(Exception):
    """Base of everything this package raises on purpose.

    Args:
        what: the fact, as one clause.
        expected: what would have been right.
        got: what came instead.
        hint: what the reader can do now.
    """

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        expected: str | None = None,
        got: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.what, self.expected, self.got, self.hint = what, expected, got, hint
        details = [f"expected {expected}" if expected else "", f"got {got}" if got else ""]
        detail = ", ".join(d for d in details if d)
        message = f"{what}: {detail}" if detail else what
        super().__init__(f"{message}. {hint}" if hint else message)


class InputError(FusewiseError, ValueError):
    """An argument is malformed: size syntax, unknown backend, tensor shape, dtype or device."""

    exit_code = 2


class UnavailableError(FusewiseError, RuntimeError):
    """This machine or this process cannot run what was asked for."""

    exit_code = 3


class WorkspaceError(UnavailableError):
    """A shared buffer could not be made, mapped or grown."""


class RankError(FusewiseError, RuntimeError):
    """Something went wrong between ranks."""

    exit_code = 4


class RankTimeoutError(RankError, TimeoutError):
    """Named ranks did not arrive within the bound."""


class DisagreementError(RankError):
    """Ranks hold different values where one value is needed."""


class ProfileError(FusewiseError, ValueError):
    """A profile is malformed; the message carries the JSON path of the first fault."""

    exit_code = 5


class StaleProfileError(ProfileError):
    """A profile is well-formed and was measured on something else than this node."""


class VerificationError(FusewiseError, RuntimeError):
    """A candidate's result differs from the reference."""

    exit_code = 6
