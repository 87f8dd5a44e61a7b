"""The exceptions that the command line shows without a traceback: a mistake of the user, a failure of something beside
the run, and a stop by a signal.

Invariant: a message is complete by itself. It names the key or the file, the value, and what would be right.
The command line prints it as it is, and exits with code 2 (a mistake), 69 (a failure) or 75 (a stop).
"""

from __future__ import annotations


class UserError(Exception):
    """A mistake that the user can correct: one line per problem, ready to be shown."""


UNAVAILABLE = 69
"""Exit code when something beside the run failed (EX_UNAVAILABLE): the same command with `--resume` may succeed."""


class Unavailable(Exception):
    """Something that the run needs failed, such as a rollout engine that died: no mistake of the user, and what was
    saved is kept."""


HUNG = 70
"""Exit code of a process that its watchdog ended (`mcore/watchdog.py`): the same command with `--resume` goes on."""

STOPPED = 75
"""Exit code of a run that a signal stopped (EX_TEMPFAIL): the same command with `--resume` goes on."""


class StoppedBySignal(Exception):
    """A signal stopped the run, which has saved and can go on."""
