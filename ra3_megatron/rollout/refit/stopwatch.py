"""Where the seconds of a refit go, on the side that measures: of the host, which waits for a GPU in few places.

watch = Stopwatch("wait")
watch.start("fill")  # what comes now is that, until the next part
"""

import time


class Stopwatch:
    """Seconds by part. There is always one part that runs, so they add up to the whole."""

    def __init__(self, part: str) -> None:
        self.seconds: dict[str, float] = {}
        self._part, self._since = part, time.perf_counter()

    def start(self, part: str) -> str:
        """From now on it is this one; the one before."""
        now = time.perf_counter()
        self.seconds[self._part] = self.seconds.get(self._part, 0.0) + now - self._since
        before, self._part, self._since = self._part, part, now
        return before

    def stop(self) -> dict[str, float]:
        """Seconds of each part until now."""
        self.start(self._part)
        return dict(self.seconds)
