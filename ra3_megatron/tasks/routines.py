"""Routines: runs of lines that work on a list `x`, which the program families put together.

Many share their opening lines, so a latent that names the routine pays at its first line and again where it parts from
the others. Without it the hand-written routines cost log 16 = 2.77 nats each, over their lines 0 and 2 above all.
"""

from random import Random

from ra3_megatron.config.tasks import ROUTINES

LABELS = tuple("ABCDEFGHIJKLMNOP")
"""Names of the routines."""

_WRITTEN: tuple[tuple[str, ...], ...] = (
    ("x = x[::-1]", "x = x + x[:1]"),
    ("x = sorted(x)", "x = x[1:]"),
    ("y = []", "for v in x:", "    y.append(v + 1)", "x = y"),
    ("y = []", "for v in x:", "    y.append(v * 2)", "x = y"),
    ("y = []", "for v in x:", "    if v % 2 == 0:", "        y.append(v)", "x = y"),
    ("y = []", "for v in x:", "    if v > 3:", "        y.append(v)", "x = y"),
    ("y = []", "for v in x:", "    if v not in y:", "        y.append(v)", "x = y"),
    ("s = 0", "y = []", "for v in x:", "    s = s + v", "    y.append(s)", "x = y"),
    ("s = 0", "for v in x:", "    s = s + v", "x = x + [s]"),
    ("s = len(x)", "x = x + [s]"),
    ("y = []", "for v in x:", "    y.append(v)", "    y.append(v)", "x = y"),
    ("s = max(x + [0])", "x = [s] + x"),
    ("s = min(x + [9])", "x = [v - s for v in x]"),
    ("x = x[::2]", "x = x + [1]"),
    ("y = []", "for v in x:", "    y = [v] + y", "x = y"),
    ("x = [v * v for v in x]", "x = [v % 7 for v in x]"),
)
_OPENINGS = ("x = x[::-1]", "x = sorted(x)", "x = x[::2]", "x = [v + 1 for v in x]")
_SECONDS = ("x = x + [1]", "x = x[1:]", "x = [0] + x", "x = x + x[:1]")
_OTHERS = ("x = [v % 7 for v in x]", "x = [v * 2 for v in x]", "x = x[:9]", "x = [v - 1 for v in x]", "x = x + [3]")


def routines(lines: int | None) -> dict[str, tuple[str, ...]]:
    """Label -> lines, without indentation. lines: of every routine; None: the hand-written ones (2 to 6 lines).

    With `lines`, the first two tell a routine (4 openings, 4 seconds); what follows is then determined.
    """
    if lines is None:
        return dict(zip(LABELS, _WRITTEN, strict=True))
    return {
        label: (
            _OPENINGS[number % 4],
            _SECONDS[number // 4],
            *(_OTHERS[(number + 2 * place) % len(_OTHERS)] for place in range(lines - 2)),
        )
        for number, label in enumerate(LABELS)
    }


def allowed(withheld: int, training: bool) -> tuple[str, ...]:
    """Labels that may occur: all, but for the last `withheld` ones in the training split."""
    return LABELS[: ROUTINES - withheld] if training else LABELS


def list_of_numbers(rng: Random) -> str:
    """A list of 2 to 6 digits, as Python text: what the programs are called with."""
    return str([rng.randint(0, 9) for _ in range(rng.randint(2, 6))])
