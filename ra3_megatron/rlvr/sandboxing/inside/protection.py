"""What keeps other processes of the same user from looking into a process, and from interrupting it."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal itself imports enum
import resource

PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER = 4, 36


def protect() -> None:
    """Nobody of this user can ptrace this process, or read its memory, descriptors or environment, from here on.

    Python's handler of interrupts is gone, too: the first process of a name space then has none, and gets no signal.
    """
    _signal.signal(_signal.SIGINT, _signal.SIG_IGN)
    _prctl(PR_SET_DUMPABLE, 0)


def unprotect() -> None:
    """Undo it, in a process that was forked from a protected one to run the candidate's code."""
    _signal.signal(_signal.SIGINT, _signal.default_int_handler)
    _prctl(PR_SET_DUMPABLE, 1)


def adopt() -> None:
    """Processes below this one whose parents have ended are its children from here on, instead of the first process's:
    it can wait for them. Until somebody does, they count."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def bound_cpu_time(seconds: int) -> None:
    """Of this process, and of each one that is forked from it."""
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))


def _prctl(option: int, value: int) -> None:
    # ctypes itself takes ten milliseconds to import.
    import _ctypes

    class Int(_ctypes._SimpleCData):
        _type_ = "i"

    class Function(_ctypes.CFuncPtr):
        _flags_ = _ctypes.FUNCFLAG_CDECL
        _restype_ = Int

    this = _ctypes.dlopen(None, 0)  # type: ignore[arg-type]
    prctl = Function(_ctypes.dlsym(this, "prctl"))
    if prctl(option, value, 0, 0, 0) != 0:
        raise OSError(f"prctl({option}, {value}) failed")
