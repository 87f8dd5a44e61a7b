"""What keeps a process of the same user from looking into another one."""

from __future__ import annotations

PR_SET_DUMPABLE = 4


def forbid_inspection() -> None:
    """Nobody of this user can ptrace this process, or read its memory, descriptors or environment, from here on."""
    # ctypes itself takes ten milliseconds to import.
    import _ctypes

    class Int(_ctypes._SimpleCData):
        _type_ = "i"

    class Function(_ctypes.CFuncPtr):
        _flags_ = _ctypes.FUNCFLAG_CDECL
        _restype_ = Int

    this = _ctypes.dlopen(None, 0)  # type: ignore[arg-type]
    prctl = Function(_ctypes.dlsym(this, "prctl"))
    if prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        raise OSError("prctl(PR_SET_DUMPABLE, 0) failed")
