"""The one exception of a refit."""


class RefitError(RuntimeError):
    """The weights did not reach the engines; the message says which tensor or process, and why."""
