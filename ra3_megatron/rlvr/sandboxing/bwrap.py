"""The command line that puts a command behind bubblewrap.

Inside: own user, process, network, IPC, host and cgroup name spaces; no capability, no new name space, no network but
an empty loopback; a root file system that cannot be written, made of the system's libraries, this interpreter and what
is given; one file system in memory at /tmp, which /dev/shm points to; a filter of system calls (`seccomp.py`).

Real root is exempt from the limit of processes, so it becomes nobody first. What nobody cannot reach (an interpreter
below /root) is mounted, in a mount name space of this command alone, where it can.
"""

from __future__ import annotations

import os
import shutil
import stat
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ra3_megatron.rlvr.sandboxing.limits import Limits, SandboxError

NOBODY = 65534
LIBRARIES = ("/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/libx32")
DEVICES = ("/dev/null", "/dev/full", "/dev/random", "/dev/urandom")
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/tmp",
    "TMPDIR": "/tmp",
    "LC_ALL": "C.UTF-8",
    "TZ": "UTC",
    "PYTHONHASHSEED": "0",
    "PYTHONDONTWRITEBYTECODE": "1",
    "MALLOC_ARENA_MAX": "2",
}
"""What a command finds; nothing of this process's environment is passed on."""

# Mounts each source at a number below $0, then goes on with what stands behind `--`.
MOUNT_AND_GO_ON = (
    "set -e; mount -t tmpfs -o size=1m,mode=755 sandbox $0; n=0; "
    'while [ "$1" != -- ]; do if [ -d "$1" ]; then mkdir $0/$n; else : > $0/$n; fi; '
    'mount --bind "$1" $0/$n; n=$((n+1)); shift; done; shift; exec "$@"'
)


@dataclass(frozen=True)
class Mounts:
    """What a command sees of this machine beside the libraries. Values: path inside -> path here."""

    read_only: Mapping[str, str]
    writable: Mapping[str, str]
    programs: bool
    """All of /usr, not only its libraries."""


def limited(argv: Sequence[str], limits: Limits, processes: bool) -> list[str]:
    """A command under the limits of the kernel. processes: their number too, which counts all of a user's."""
    cpu, disk = limits.cpu_bound, limits.disk_mib * 2**20
    bounds = [
        f"--as={limits.memory_mib * 2**20}",
        f"--cpu={cpu}:{cpu + 1}",
        f"--fsize={disk}",
        "--core=0",
        f"--nofile={limits.open_files}",
    ]
    return ["/usr/bin/prlimit", *bounds, *([f"--nproc={limits.processes}"] if processes else []), "--", *argv]


def wrapped(
    argv: Sequence[str],
    limits: Limits,
    mounts: Mounts,
    env: Mapping[str, str],
    seccomp: int,
    status: int,
    first: bool,
) -> list[str]:
    """The whole command line. seccomp, status: file descriptors, of the filter and for bwrap's reports.

    first: the command is the first process of its name space, which nobody inside can kill or stop.
    """
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise SandboxError("bwrap is gone")
    options = ["--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent", "--new-session"]
    options += ["--clearenv", "--hostname", "sandbox", "--cap-drop", "ALL", "--uid", str(NOBODY), "--gid", str(NOBODY)]
    options += ["--seccomp", str(seccomp), "--json-status-fd", str(status)]
    for name, value in {**ENVIRONMENT, **env}.items():
        options += ["--setenv", name, value]
    options += _system(mounts.programs)
    options += ["--proc", "/proc", "--size", str(limits.disk_mib * 2**20), "--tmpfs", "/tmp"]
    for device in DEVICES:
        options += ["--dev-bind", device, device]
    for link, target in {"shm": "/tmp", "fd": "/proc/self/fd"}.items():
        options += ["--symlink", target, f"/dev/{link}"]

    sources = {**mounts.read_only, **mounts.writable}
    moved: dict[str, str] = {}
    before: list[str] = []
    if os.geteuid() == 0:
        hidden = [source for source in sources.values() if not reachable(Path(source))]
        if hidden:
            place = _free_place(list(sources.values()))
            moved = {source: f"{place}/{number}" for number, source in enumerate(hidden)}
            before = ["/usr/bin/unshare", "--mount", "--propagation", "private"]
            before += ["/bin/sh", "-c", MOUNT_AND_GO_ON, place, *hidden, "--"]
        before += ["/usr/bin/setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--"]
    for inside, source in sorted(sources.items()):
        kind = "--bind" if inside in mounts.writable else "--ro-bind"
        options += [kind, moved.get(source, source), inside]
    options += ["--remount-ro", "/", "--chdir", "/tmp", *(["--as-pid-1"] if first else [])]
    return [*before, bwrap, *options, "--", *limited(argv, limits, processes=True)]


def interpreter() -> tuple[str, str]:
    """(prefix of this interpreter's installation, its executable there): the one of the environment, without it."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return sys.base_prefix, f"{sys.base_prefix}/bin/python{version}"


def reachable(path: Path) -> bool:
    """Whether everybody may read this file or folder, and pass through what lies above it."""
    path = path.resolve()
    wanted = stat.S_IROTH | (stat.S_IXOTH if path.is_dir() else 0)
    above = all(parent.stat().st_mode & stat.S_IXOTH for parent in path.parents)
    return above and path.stat().st_mode & wanted == wanted


def _system(programs: bool) -> list[str]:
    """Libraries, or all of /usr, and the old names at the root."""
    options = ["--ro-bind", "/usr", "/usr"] if programs else ["--ro-bind", "/usr/bin/prlimit", "/usr/bin/prlimit"]
    if not programs:
        for folder in LIBRARIES:
            if Path(folder).is_dir():
                options += ["--ro-bind", folder, folder]
    for name in ("bin", "lib", "lib32", "lib64", "libx32", "sbin"):
        old = Path("/", name)
        if old.is_symlink():
            options += ["--symlink", os.readlink(old), str(old)]
        elif old.is_dir() and (programs or name.startswith("lib")):
            options += ["--ro-bind", str(old), str(old)]
    return options


def _free_place(sources: list[str]) -> str:
    """A folder of the system above none of the sources, to mount over."""
    for place in ("/mnt", "/media", "/srv", "/opt", "/var/tmp"):
        if Path(place).is_dir() and not any(Path(source).resolve().is_relative_to(place) for source in sources):
            return place
    raise SandboxError(
        "no folder to mount the interpreter in: /mnt, /media, /srv, /opt and /var/tmp are missing or in use"
    )
