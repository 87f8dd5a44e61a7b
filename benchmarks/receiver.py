"""Stands for an engine: a process that takes weights as fast as they come, and drops them.

`python -m benchmarks.receiver` reads pickled sources of weights from its standard input, and answers each with the
number of tensors when it has taken all.
"""

import pickle
import sys


def main() -> None:
    """Serve until the input ends."""
    while True:
        try:
            source = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(sum(1 for _ in source.tensors()), sys.stdout.buffer)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
