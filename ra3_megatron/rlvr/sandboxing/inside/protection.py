"""What keeps other processes of the same user from looking into a process, and from interrupting it."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal itself imports enum

PR_SET_DUMPABLE = 4


def protect() -> None:
    """Nobody of this user can ptrace this process, or read its memory, descriptors or environment, from here on.

    Python's handler of interrupts is gone, too: the first process of a name space then has none, and gets no signal.
    """
    _signal.signal(_signal.SIGINT, _signal.SIG_IGN)
    _set_dumpable(0)


def unprotect() -> None:
    """Undo it, in a process that was forked from a protected one to run the candidate's code."""
    _signal.signal(_signal.SIGINT, _signal.default_int_handler)
    _set_dumpable(1)


def _set_dumpable(value: int) -> None:
    # ctypes itself takes ten milliseconds to import.
    import _ctypes

    class Int(_ctypes._SimpleCData):
        _type_ = "i"

    class Function(_ctypes.CFuncPtr):
        _flags_ = _ctypes.FUNCFLAG_CDECL
        _restype_ = Int

    this = _ctypes.dlopen(None, 0)  # type: ignore[arg-type]
    prctl = Function(_ctypes.dlsym(this, "prctl"))
    if prctl(PR_SET_DUMPABLE, value, 0, 0, 0) != 0:
        raise OSError(f"prctl(PR_SET_DUMPABLE, {value}) failed")
