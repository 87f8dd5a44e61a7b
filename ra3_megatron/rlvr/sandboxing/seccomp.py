"""The system calls that the sandbox denies, as a BPF program for `bwrap --seccomp`.

Denied are calls that make memory which no limit counts (memfd, System V, POSIX queues), new name spaces and mounts,
calls that reach into other processes, and parts of the kernel that programs do not need. They fail with EPERM. clone3
hides its flags from a filter: it fails with ENOSYS, and the C library takes clone. So do calls newer than this list.
Sockets are of the families unix, IPv4 and IPv6 only: a network name space does not hold others (AF_VSOCK) back.
"""

from __future__ import annotations

import platform
import struct

EPERM, ENOSYS = 1, 38
KILL, ERROR, ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
NUMBER_AT, ARCHITECTURE_AT, FIRST_ARGUMENT_AT = 0, 4, 16
NEW_NAME_SPACES = 0x7E020000
"""CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET."""
FAMILIES = (1, 2, 10)
"""AF_UNIX, AF_INET, AF_INET6."""
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
CLONE3 = 435


def known(machine: str = "") -> bool:
    """Whether there is a filter for this machine's processor."""
    return (machine or platform.machine()) in ARCHITECTURES


def program(machine: str = "") -> bytes:
    """The filter for this machine's processor. Raises KeyError where none is known."""
    machine = machine or platform.machine()
    denied = (*DENIED[machine], *COMMON)
    # The three ends, from the last instruction backwards, so that a jump can name its distance.
    tail = [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, ERROR | EPERM), (RETURN, 0, 0, ERROR | ENOSYS)]
    families = [(EQUAL, len(FAMILIES) - number, 0, family) for number, family in enumerate(FAMILIES)]
    clone = [(LOAD, 0, 0, FIRST_ARGUMENT_AT), (ANY_BIT, 1, 0, NEW_NAME_SPACES)]
    socket = [(LOAD, 0, 0, FIRST_ARGUMENT_AT), *families]
    # socket falls through to EPERM; its families jump over it to ALLOW. clone jumps either way.
    body = [
        (LOAD, 0, 0, ARCHITECTURE_AT),
        (EQUAL, 1, 0, ARCHITECTURES[machine]),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER_AT),
    ]
    # Layout behind the body: checks, ALLOW, clone (2 and its ends), socket (and its ends), EPERM, ENOSYS.
    checks = [AT_LEAST, EQUAL, EQUAL, EQUAL, *(EQUAL for _ in denied)]
    values = [NEWEST + 1, CLONE3, CLONE[machine], SOCKET[machine], *denied]
    ends = {
        "clone": 1,
        "socket": 1 + len(clone) + 2,
        "eperm": 1 + len(clone) + 2 + len(socket) + 2,
        "enosys": 1 + len(clone) + 2 + len(socket) + 2 + 1,
    }
    names = ["enosys", "enosys", "clone", "socket", *("eperm" for _ in denied)]
    for number, (code, value, name) in enumerate(zip(checks, values, names, strict=True)):
        body.append((code, len(checks) - 1 - number + ends[name], 0, value))
    body += [tail[0], *clone, tail[0], tail[1], *socket, tail[1], tail[0], tail[1], tail[2]]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in body)
