"""Bytes of token ids: what every tokenizer implementation shares."""

from collections.abc import Callable, Iterable, Sequence

ACT, THINK, END_THINK = "<act>", "<think>", "</think>"
MARKERS = (ACT, THINK, END_THINK)
"""Names of the reserved tokens of the `tokens` latent format."""

SPACE_SYMBOL = "\u2581"
"""What stands for a space in SentencePiece-like vocabularies."""


class Vocabulary:
    """Bytes of each token id, and the ids of single bytes as the last resort of encoding."""

    def __init__(self, token_bytes: list[bytes], byte_ids: dict[int, int]) -> None:
        self.token_bytes = token_bytes
        self._byte_ids = byte_ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of `ids`."""
        table = self.token_bytes
        return b"".join([table[i] for i in ids])

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def exact(self, text: str, encode: Callable[[str], Sequence[int]]) -> list[int]:
        """`encode(text)` where its bytes are those of `text`; a character for which they are not goes byte by byte."""
        ids = list(encode(text))
        if self.decode_bytes(ids) == text.encode("utf-8"):
            return ids
        if len(text) > 1:
            middle = len(text) // 2
            return self.exact(text[:middle], encode) + self.exact(text[middle:], encode)
        try:
            return [self._byte_ids[byte] for byte in text.encode("utf-8")]
        except KeyError as error:
            raise ValueError(f"the tokenizer has no token for the character {text!r}") from error


def byte_level_alphabet() -> dict[str, int]:
    """Byte that each character of a byte-level BPE vocabulary stands for (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def byte_piece(byte: int) -> str:
    """Name of the piece that stands for one byte in vocabularies with byte fallback."""
    return f"<0x{byte:02X}>"
