"""Run one command behind the wall that was asked for, again when the wall itself failed."""

from __future__ import annotations

import errno
import logging
import os
import platform
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

from ra3_megatron.config.errors import UserError
from ra3_megatron.rlvr.sandboxing import seccomp
from ra3_megatron.rlvr.sandboxing.bwrap import ENVIRONMENT, NOBODY, Mounts, interpreter, limited, wrapped
from ra3_megatron.rlvr.sandboxing.execute import execute
from ra3_megatron.rlvr.sandboxing.limits import Ended, Isolation, Limits, SandboxError

logger = logging.getLogger(__name__)

ATTEMPTS = 4
"""Once, and three times more."""
BACKOFF_SECONDS = 0.2
PASSING = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
"""Errors at the start of a process that may be gone in a moment."""
OLDEST = (0, 8)
"""Version of bubblewrap that knows --disable-userns."""


class Infrastructure(Exception):
    """One attempt failed for a reason that is not the command's."""


def run_command(
    argv: Sequence[str],
    limits: Limits,
    isolation: Isolation,
    stdin: bytes = b"",
    read_only: Sequence[str | os.PathLike[str]] = (),
    writable: Sequence[str | os.PathLike[str]] = (),
    env: Mapping[str, str] | None = None,
) -> Ended:
    """Run any command, without network and with none of this process's environment; /tmp is its own, and empty.

    It sees the system's programs, this interpreter without its environment (a venv and packages are given in
    `read_only`), and the paths given, each under its own name. What is in `writable` is not bounded by disk_mib in all,
    only the largest file is. Run by real root, the command is nobody: it reads what everybody may read, and the
    writable folders belong to nobody meanwhile, with all that is in them, and afterwards to the owner of each folder.

    Raises SandboxError when the sandbox failed several times, UserError when it cannot work here.
    """
    require_bubblewrap(isolation)
    prefix = interpreter()[0]
    mounts = Mounts(
        read_only={path: path for path in {prefix, *map(os.path.abspath, read_only)} if path != "/usr"},
        writable={path: path for path in map(os.path.abspath, writable)},
        programs=True,
    )
    owners = _hand_over(list(mounts.writable)) if isolation is Isolation.BUBBLEWRAP else {}
    try:
        return retried(lambda: attempt(argv, limits, isolation, mounts, stdin, env or {}))
    finally:
        for path, (user, group) in owners.items():
            _change_owner(path, user, group)


def attempt(
    argv: Sequence[str],
    limits: Limits,
    isolation: Isolation,
    mounts: Mounts,
    stdin: bytes,
    env: Mapping[str, str],
    first: bool = False,
    output_bytes: int | None = None,
    started: bytes = b"",
) -> Ended:
    """One attempt. Raises Infrastructure.

    first: see bwrap.wrapped. output_bytes: the most of stdout; None: output_kib. started: see execute.
    """
    output_bytes = limits.output_kib * 1024 if output_bytes is None else output_bytes
    try:
        if isolation is Isolation.UNSAFE:
            with _warning:  # of several programs at once the first one says it
                _warn()
            with tempfile.TemporaryDirectory(prefix="sandbox-") as folder:
                found = {**ENVIRONMENT, "HOME": folder, "TMPDIR": folder, **env}
                line = limited(argv, limits, processes=False)
                return execute(line, limits, stdin, output_bytes, found, folder, started=started)[0]
        rules = os.memfd_create("seccomp")
        try:
            os.write(rules, seccomp.program())
            os.lseek(rules, 0, os.SEEK_SET)
            ended, reported = execute(
                lambda status: wrapped(argv, limits, mounts, env, rules, status, first),
                limits,
                stdin,
                output_bytes,
                {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
                "/",
                (rules,),
                started,
            )
        finally:
            os.close(rules)
    except OSError as error:
        if error.errno in PASSING:
            raise Infrastructure(f"no process could be started: {error.strerror}") from None
        raise
    except ValueError as error:  # what the kernel or bwrap tell of a program cannot be read
        raise Infrastructure(f"it could not be watched: {error}") from error
    stopped = ended.timed_out or ended.out_of_memory or ended.flooded
    if "exit-code" not in reported and not (stopped and "child-pid" in reported):
        last = ended.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        raise Infrastructure(" ".join(last) or f"bwrap ended with {ended.returncode}")
    return ended


def retried(action: Callable[[], Ended]) -> Ended:
    """How the command ended. Raises SandboxError after ATTEMPTS failures of the sandbox."""
    for number in range(ATTEMPTS):
        try:
            return action()
        except Infrastructure as error:
            failure = error
            logger.warning("the sandbox failed (attempt %d of %d): %s", number + 1, ATTEMPTS, error)
            time.sleep(BACKOFF_SECONDS * 2**number)
    raise SandboxError(f"the sandbox failed {ATTEMPTS} times: {failure}")


def require_bubblewrap(isolation: Isolation) -> None:
    """Raises UserError when bubblewrap is asked for and does not work here, with the reason and the way out."""
    if isolation is Isolation.BUBBLEWRAP and (problem := _problem()) is not None:
        raise UserError(
            f"sandbox=bubblewrap: {problem} (sandbox=subprocess-unsafe runs programs without isolation: only where "
            "they can do no harm)"
        )


@cache
def _problem() -> str | None:
    """What keeps bubblewrap from working here, if anything does."""
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        return "bwrap is missing: `make install-sandbox`, or `apt-get install bubblewrap`"
    if not seccomp.known():
        return f"no filter of system calls is known for {platform.machine()} (x86_64 and aarch64 are)"
    told = subprocess.run([bwrap, "--version"], capture_output=True, text=True, check=False).stdout
    version = tuple(int(part) for part in re.findall(r"\d+", told)[:2])
    if version < OLDEST:
        return f"{told.strip()} is too old, {OLDEST[0]}.{OLDEST[1]} or newer is needed"
    prefix, python = interpreter()
    mounts = Mounts({prefix: prefix}, {}, programs=True)
    try:
        ended = attempt([python, "-I", "-S", "-c", PROBE], Limits(), Isolation.BUBBLEWRAP, mounts, b"", {})
    except (Infrastructure, OSError) as error:
        return f"bwrap does not work here: {error}.{_hint()}"
    if ended.returncode or ended.stdout != b"well\n":
        said = " ".join(ended.stderr.decode("utf-8", "replace").split()[-40:])
        return f"a command in it ended with {ended.returncode}: {said}"
    return None


PROBE = "import os; os.fork() or os._exit(0); os.wait(); print('well')"
"""Also a process more: kernels before 5.14 count those of a user outside of the sandbox too."""


def _hint() -> str:
    """Which switch of the kernel forbids user name spaces, if one does."""
    switches = {
        "kernel/unprivileged_userns_clone": "0",
        "user/max_user_namespaces": "0",
        "kernel/apparmor_restrict_unprivileged_userns": "1",
    }
    for name, forbids in switches.items():
        file = Path("/proc/sys", name)
        if file.exists() and file.read_text().strip() == forbids:
            return f" User name spaces are disabled: {name.replace('/', '.')}={forbids}."
    return " In a container, user name spaces and mounts must be allowed." if Path("/.dockerenv").exists() else ""


_warning = threading.Lock()


@cache
def _warn() -> None:
    logger.warning(
        "sandbox=subprocess-unsafe: programs run as this user, with its files, its network and its processes"
    )


def _hand_over(folders: list[str]) -> dict[str, tuple[int, int]]:
    """Give folders to nobody when this is real root: their owners."""
    if os.geteuid() != 0:
        return {}
    owners = {}
    for path in folders:
        found = os.stat(path)
        owners[path] = (found.st_uid, found.st_gid)
        _change_owner(path, NOBODY, NOBODY)
    return owners


def _change_owner(path: str, user: int, group: int) -> None:
    """Of a folder and all in it; links are not followed."""
    os.lchown(path, user, group)
    for _, folders, files, descriptor in os.fwalk(path):
        for name in (*folders, *files):
            os.chown(name, user, group, dir_fd=descriptor, follow_symlinks=False)
