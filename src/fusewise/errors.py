"""The one exception tree. Every message says what was expected, what came, and what to do next.

This file never formats for a terminal. ``EXIT_CODES`` is the one table of what the command line
returns.
"""

from __future__ import annotations

EXIT_CODES = {
    0: "done",
    1: "a fault of fusewise itself",
    2: "bad input: an unknown name, a size, a shape, an option",
    3: "unavailable: this machine cannot do that, or a file cannot be written",
    4: "ranks failed, died, disagreed or did not answer in time",
    5: "a profile is broken, missing, stale or of another node",
    6: "a result was wrong",
    7: "a check that was asked for did not pass (audit --check)",
    130: "interrupted",
}


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

    def about(self, name: str) -> FusewiseError:
        """The same error, with what it is about in front: a variable's or an option's name."""
        return type(self)(
            f"{name}: {self.what}", expected=self.expected, got=self.got, hint=self.hint
        )


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


class CheckError(FusewiseError):
    """What a check was asked to forbid is the case."""

    exit_code = 7
