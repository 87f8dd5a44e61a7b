"""The one exception that stands for a mistake of the user, not of the program.

Invariant: the message is complete by itself. It names the key or the file, the value, and what would be right.
The command line prints it as it is, without a traceback, and exits with code 2.
"""

from __future__ import annotations


class UserError(Exception):
    """A mistake that the user can correct: one line per problem, ready to be shown."""
