"""Tests of whole programs: what a program printed for an input, compared in the runner.

Without a checker outputs are equal when their tokens are (white space only separates); with a tolerance, tokens that
are numbers on both sides may differ by it, absolutely or relative to the expected one. A checker is trusted source that
defines `check(input, expected, output) -> bool`.
"""

from __future__ import annotations

from .channel import Broken, Channel
from .codec import Decoder, Encoder, Malformed, Unsendable, no_handle
from .tests import Failure

TYPE_CHECKING = False  # importing typing takes longer than most tests
if TYPE_CHECKING:
    from typing import Any


class CaseRunner:
    """Runs the cases one by one. `most`: bytes of output of one case."""

    def __init__(
        self,
        channel: Channel,
        code: str,
        cases: tuple[tuple[str, str], ...],
        checker: str | None,
        most: int,
        tolerance: float,
    ) -> None:
        self.channel = channel
        self.cases = cases
        self.most = most
        self.tolerance = tolerance
        self.check: Any = None
        if checker is not None:
            namespace: dict[str, Any] = {"__name__": "checker"}
            exec(compile(checker, "<checker>", "exec", dont_inherit=True), namespace)
            self.check = namespace["check"]
        try:
            self._send(code)
        except Unsendable as error:
            raise Failure("raised", f"the program: {error}") from None

    def _send(self, value: Any) -> None:
        self.channel.send(Encoder(no_handle, [], keep=False).encode(value))

    def run(self, number: int) -> None:
        """Run one case. Raises Failure."""
        data, expected = self.cases[number]
        where = f"case {number + 1}"
        try:
            self._send((data.encode("utf-8", "surrogatepass"), self.most))
            ended, output, errors = Decoder(self.channel.receive(), no_handle, [], keep=False).decode()
        except (Broken, Malformed, ValueError, TypeError) as error:
            raise Failure("ended", f"{error} in {where}") from None
        if ended == "flood":
            raise Failure("flood", f"more than {self.most} bytes of output in {where}")
        if ended != "exit 0":
            last = errors.decode("utf-8", "replace").strip().splitlines()[-3:]
            kind = {"signal 24": "cpu"}.get(ended, "raised")
            if last and last[-1].startswith("MemoryError"):
                kind = "memory"
            raise Failure(kind, f"{' '.join(last) or ended} in {where}")
        text = output.decode("utf-8", "replace")
        try:
            right = self.check(data, expected, text) if self.check else same(expected, text, self.tolerance)
        except (Exception, SystemExit) as error:
            raise Failure("wrong", f"{type(error).__name__}: {error} in the checker, {where}") from None
        if right is not True:
            raise Failure("wrong", f"wrong output in {where}: {text[:200]!r}")


def same(expected: str, output: str, tolerance: float) -> bool:
    """Whether the tokens are equal, numbers within `tolerance`."""
    if tolerance == 0:
        return expected.split() == output.split()
    first, second = expected.split(), output.split()
    return len(first) == len(second) and all(
        one == other or _close(one, other, tolerance) for one, other in zip(first, second, strict=True)
    )


def _close(expected: str, output: str, tolerance: float) -> bool:
    try:
        wanted, found = float(expected), float(output)
    except ValueError:
        return False
    if wanted - wanted != 0:  # infinite, or no number: the texts differ
        return wanted == found
    return abs(wanted - found) <= tolerance * max(1.0, abs(wanted))
