"""The errors that a collective call can end in, beside ValueError (arguments) and TimeoutError (a rank did not come).

The C++ core raises them too, so they carry a text and nothing else. Every text names the op, the group, the rank and
the number of the call.
"""

from __future__ import annotations

from collections.abc import Iterable


def shorten(names: Iterable[str], most: int = 3) -> str:
    """Return names for a message, at most `most` of them: "a, b, c and 2 more"."""
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


class RankMismatchError(RuntimeError):
    """The ranks did not make the same call: another op, shape, dtype, reduction or codec.

    All ranks get it in the same call, before any data is read, and the text prints both sides. The group stays usable
    when the ranks agree again in their next call.
    """


class PeerLostError(RuntimeError):
    """A rank died or closed its group, so that the call can never end.

    The text names the rank and the last call it made. The group is broken: every later call raises the same error.
    """


class UserError(ValueError):
    """Something the user can put right; the text is one sentence that says what to change."""


class CheckpointError(ValueError):
    """A checkpoint could not be written or read; the text says which, why, and what to do."""


class PlanError(ValueError):
    """A plan does not fit the model, or a model cannot be cut; the text names the modules and says why."""


class DeriveError(ValueError):
    """No plan can be derived for a model; the text names the module and says why."""


class UnequalGroupsError(RuntimeError):
    """Ranks belong to different numbers of process groups, so that torch can make no more for some of them only."""
