"""The one error type that a user can cause and mend."""

from __future__ import annotations


class Note(UserWarning):
    """Something a person should know and need not mend; the command line shows it as a note."""


class UserError(ValueError):
    """A mistake that the user can fix: shown as one line, exit code 2.

    Args:
        what: what is wrong, with the offending value.
        where: the option, file or field it concerns.
        fix: what to type or change instead.
    """

    def __init__(self, what: str, *, where: str, fix: str):
        self.what, self.where, self.fix = (_one_line(part) for part in (what, where, fix))
        super().__init__(f"{self.where}: {self.what}; {self.fix}")


def _one_line(text: str, limit: int = 160) -> str:
    """Printable characters only, folded to one line, so that no input can break the message."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= limit else line[: limit - 3] + "..."
