"""The door to latents and documents: everything that other rooms use of `formats` and `documents`."""

from ra3_megatron.text.documents import (
    Document,
    code_text,
    compose,
    cut,
    encode_document,
    full_text,
    marked_text,
    raw,
)
from ra3_megatron.text.formats import CommentFormat, LatentFormat, Line, TokensFormat, build_format

__all__ = [
    "CommentFormat",
    "Document",
    "LatentFormat",
    "Line",
    "TokensFormat",
    "build_format",
    "code_text",
    "compose",
    "cut",
    "encode_document",
    "full_text",
    "marked_text",
    "raw",
]
