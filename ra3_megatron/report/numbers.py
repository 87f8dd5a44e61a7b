"""How figures are written for people; an absent one is a dash."""

import math

ABSENT = "–"


def number(value: float | int | None, digits: int = 3) -> str:
    """A figure with `digits` decimals; very small and very large ones with an exponent; integers as they are."""
    if value is None:
        return ABSENT
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return str(value)
    if value != 0 and not 10.0**-digits <= abs(value) < 1e6:
        return f"{value:.{max(digits - 1, 1)}e}"
    return f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    """A share in percent."""
    return ABSENT if value is None else f"{100 * value:.1f}%"


def count(value: float | int | None) -> str:
    """A count or rate in three digits: 950, 8.19k, 1.05M."""
    if value is None:
        return ABSENT
    if abs(value) < 1000 and value == int(value):
        return str(int(value))
    for limit, unit in ((1e3, ""), (1e6, "k"), (1e9, "M"), (1e12, "G"), (math.inf, "T")):
        scaled = value / (limit / 1e3 if limit < math.inf else 1e12)
        if abs(scaled) < 999.5:
            return f"{scaled:.3g}{unit}"
    return f"{value:.3g}"


def duration(seconds: float | None) -> str:
    """A time: 0.8 s, 42 s, 3 min 05 s, 2 h 07 min."""
    if seconds is None:
        return ABSENT
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def clock(seconds: float) -> str:
    """A time as 0:42, 3:05 or 2:07:30."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def step_time(seconds: float) -> str:
    """Time of a step, also of a short one: 0.4 ms, 31 ms, 5.2 s, 3 min 05 s."""
    if seconds < 0.9995:
        return f"{1000 * seconds:.1f} ms" if seconds < 0.00995 else f"{1000 * seconds:.0f} ms"
    return duration(seconds)


def whole_percent(share: float) -> str:
    """A share in whole percent; one that would round to nothing is named as less than one."""
    return "<1%" if 0 < share < 0.005 else f"{100 * share:.0f}%"
