"""The system calls that the sandbox denies, as a BPF program for `bwrap --seccomp`.

Denied are calls that make memory which no limit counts (memfd, System V, POSIX queues, mappings that are shared and no
file's, whose pages stay when the mapping goes, buffers of TCP), new name spaces and mounts,
calls that reach into other processes, and parts of the kernel that programs do not need. They fail with EPERM. clone3
hides its flags from a filter: it fails with ENOSYS, and the C library takes clone. So do calls newer than this list.
prlimit is for the process itself: the runner would take a lower limit from any process of its user. Sockets are of the
family unix only: a network name space does not hold others (AF_VSOCK) back.
"""

from __future__ import annotations

import platform
import struct

EPERM, ENOSYS = 1, 38
KILL, ERROR, ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
NUMBER_AT, ARCHITECTURE_AT, FIRST_ARGUMENT_AT, FOURTH_ARGUMENT_AT = 0, 4, 16, 40
NEW_NAME_SPACES = 0x7E020000
"""CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET."""
FAMILIES = (1,)
"""AF_UNIX."""
SHARED, ANONYMOUS = 0x01, 0x20
"""Flags of mmap (MAP_SHARED_VALIDATE has the first, too)."""
NEWEST = 451
"""The last call that the authors of the list knew."""

COMMON = (425, 426, 427, 428, 429, 430, 431, 432, 433, 438, 440, 442, 443, 447)
"""io_uring (3), open_tree, move_mount, fsopen, fsconfig, fsmount, fspick, pidfd_getfd, process_madvise, mount_setattr,
quotactl_fd, memfd_secret: the same numbers everywhere."""

DENIED = {
    "x86_64": (
        *(29, 30, 31, 64, 68, 240, 319),  # shmget, shmat, shmctl, semget, msgget, mq_open, memfd_create
        *(101, 310, 311, 312),  # ptrace, process_vm_readv, process_vm_writev, kcmp
        *(
            155,
            161,
            165,
            166,
            272,
            308,
            303,
            304,
        ),  # pivot_root, chroot, mount, umount2, unshare, setns, handles of files
        *(135, 154, 172, 173),  # personality, modify_ldt, iopl, ioperm
        *(163, 167, 168, 169, 175, 176, 179, 246, 313, 320),  # acct, swap, reboot, modules, quotactl, kexec
        *(248, 249, 250, 278, 298, 300, 321, 323),  # keys, vmsplice, perf_event_open, fanotify_init, bpf, userfaultfd
    ),
    "aarch64": (
        *(194, 195, 196, 190, 186, 180, 279),
        *(117, 270, 271, 272),
        *(41, 51, 40, 39, 97, 268, 264, 265),
        *(92,),
        *(89, 224, 225, 142, 105, 106, 60, 104, 273, 294),
        *(217, 218, 219, 75, 241, 262, 280, 282),
    ),
}
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
CLONE = {"x86_64": 56, "aarch64": 220}
SOCKET = {"x86_64": 41, "aarch64": 198}
PRLIMIT = {"x86_64": 302, "aarch64": 261}
MMAP = {"x86_64": 9, "aarch64": 222}
CLONE3 = 435
Line = tuple[str, int, int, str, str]
"""(label, operation, value, label to jump to when it holds, label to jump to when not); no label: the next line."""


def known(machine: str = "") -> bool:
    """Whether there is a filter for this machine's processor."""
    return (machine or platform.machine()) in ARCHITECTURES


def program(machine: str = "") -> bytes:
    """The filter for this machine's processor. Raises KeyError where none is known."""
    machine = machine or platform.machine()
    lines: list[Line] = [
        ("", LOAD, ARCHITECTURE_AT, "", ""),
        ("", EQUAL, ARCHITECTURES[machine], "number", "kill"),
        ("number", LOAD, NUMBER_AT, "", ""),
        ("", AT_LEAST, NEWEST + 1, "no such call", ""),
        ("", EQUAL, CLONE3, "no such call", ""),
        ("", EQUAL, CLONE[machine], "clone", ""),
        ("", EQUAL, SOCKET[machine], "socket", ""),
        ("", EQUAL, PRLIMIT[machine], "prlimit", ""),
        ("", EQUAL, MMAP[machine], "mmap", ""),
        *(("", EQUAL, number, "deny", "") for number in (*DENIED[machine], *COMMON)),
        ("allow", RETURN, ALLOW, "", ""),
        ("clone", LOAD, FIRST_ARGUMENT_AT, "", ""),
        ("", ANY_BIT, NEW_NAME_SPACES, "deny", "allow too"),
        ("mmap", LOAD, FOURTH_ARGUMENT_AT, "", ""),
        ("", ANY_BIT, ANONYMOUS, "", "allow too"),
        ("", ANY_BIT, SHARED, "deny", "allow too"),
        ("prlimit", LOAD, FIRST_ARGUMENT_AT, "", ""),
        ("", EQUAL, 0, "allow too", "deny"),
        ("socket", LOAD, FIRST_ARGUMENT_AT, "", ""),
        *(("", EQUAL, family, "allow too", "") for family in FAMILIES),
        ("deny", RETURN, ERROR | EPERM, "", ""),
        ("allow too", RETURN, ALLOW, "", ""),
        ("no such call", RETURN, ERROR | ENOSYS, "", ""),
        ("kill", RETURN, KILL, "", ""),
    ]
    places = {label: place for place, (label, *_) in enumerate(lines) if label}
    code = b""
    for place, (_, operation, value, yes, no) in enumerate(lines):
        jumps = (places[label] - place - 1 if label else 0 for label in (yes, no))
        code += struct.pack("=HBBI", operation, *jumps, value)
    return code
