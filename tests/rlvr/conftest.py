"""One open sandbox for all tests of a module. Where bubblewrap does not work, CI fails and others skip."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from ra3_megatron.config.errors import UserError
from ra3_megatron.rlvr.sandbox import Isolation, Limits, Sandbox, require_bubblewrap


@pytest.fixture(scope="session")
def bubblewrap() -> Isolation:
    """Bubblewrap, which works here."""
    try:
        require_bubblewrap(Isolation.BUBBLEWRAP)
    except UserError as error:
        if os.environ.get("CI"):
            pytest.fail(str(error))
        pytest.skip(f"the sandbox does not work here: {error}")
    return Isolation.BUBBLEWRAP


@pytest.fixture(scope="module")
def sandbox(bubblewrap: Isolation) -> Iterator[Sandbox]:
    """Behind bubblewrap; time enough for a busy machine."""
    with Sandbox(bubblewrap, Limits(seconds=20), workers=2) as opened:
        yield opened


@pytest.fixture(scope="module")
def hasty(bubblewrap: Isolation) -> Iterator[Sandbox]:
    """The same with two seconds, for what never ends."""
    with Sandbox(bubblewrap, Limits(seconds=2), workers=2) as opened:
        yield opened
