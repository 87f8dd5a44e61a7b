"""JSON values in the source of tests: arguments of functions, and their results."""

import json
from typing import Any

from ra3_megatron.config.errors import UserError
from ra3_megatron.rlvr.sandboxing.inside.codec import Encoder, Unsendable, no_handle
from ra3_megatron.rlvr.sandboxing.inside.remote import MOST_DROPPED

LONG = 20_000
"""Letters of a value from which on it stands in a test as a text of JSON: Python takes twenty times as long, and much
more memory, to compile it than to parse that."""

SETUP = """
from math import inf, nan

def _value(text):
    from json import loads  # here: it takes longer than most tests, and few have a long value
    return loads(text)
"""
"""What `source_of` needs."""


def source_of(value: Any) -> str:
    """An expression that gives the value. Raises UserError for one that the sandbox cannot pass to a program, or get
    from it: nobody could pass such a test."""
    try:
        encoder = Encoder(no_handle, [], keep=False)
        encoder.nodes = 2 * MOST_DROPPED
        encoder.encode([[[value]]])  # a call stands around it
    except Unsendable as error:
        raise UserError(f"the sandbox cannot pass {error}") from None
    text = repr(value)
    return text if len(text) < LONG else f"_value({json.dumps(value)!r})"
