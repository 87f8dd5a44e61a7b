"""A toy tokenizer and models small enough to enumerate what they do; shared by the tests of rollout and em.

`full_logits` and `latent_log_probs` say what method.md says, from plain forward passes over whole sequences and from
the bytes of the tokens: without caches, without token sets, without the package's event log-probabilities.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ra3_megatron.config.data import TextConfig
from ra3_megatron.config.model import ModelConfig, ParallelConfig
from ra3_megatron.config.run import RunConfig
from ra3_megatron.mcore.batch import TokenBatch
from ra3_megatron.mcore.model import LanguageModel, build_model, language_model
from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.text.latents import Document, LatentFormat, build_format, compose, encode_document
from ra3_megatron.text.segment import WHITESPACE
from ra3_megatron.text.transcript import Role, Transcript
from ra3_megatron.text.vocabulary import MARKERS

SMALL = [b"\n", b"  ", b"#", b"#b\n", b" #", b"a", b" b", b"b", b"):\n", b"\n\n"]
"""What makes decisions hard to read: a thought that is one token; spaces and line breaks inside visible tokens."""
LARGE = [
    *SMALL,
    b"c",
    b"d",
    b"ab",
    b" = ",
    b"=",
    b"(",
    b")",
    b" ",
    b"\t",
    b"\td",
    b"# a",
    b"#a",
    b"c\n",
    b"\n  ",
    b"x\ny",
]
"""More of the same; "\\td" cannot be told from a thought at its indentation, as no token starts with "\\t#"."""

FORMATS = ("comment", "tokens")


class Documents(list[Transcript]):
    """A store of transcripts."""

    @property
    def lengths(self) -> list[int]:
        return [t.num_tokens for t in self]


class ToyTokenizer:
    """Longest match over a table of byte strings; ids 0 and 1 start and end a document."""

    def __init__(self, table: Sequence[bytes]) -> None:
        self.token_bytes = [b"", b"", *table, *(b"" for _ in MARKERS)]
        self.bos, self.eos, self.pad = 0, 1, 1
        self.vocab_size = len(self.token_bytes)
        self.special = {marker: 2 + len(table) + n for n, marker in enumerate(MARKERS)}
        self.fingerprint = "toy"

    def encode(self, text: str) -> list[int]:
        data, ids = text.encode(), []
        while data:
            fits = [i for i, token in enumerate(self.token_bytes) if token and data.startswith(token)]
            ids.append(max(fits, key=lambda i: len(self.token_bytes[i])))
            data = data[len(self.token_bytes[ids[-1]]) :]
        return ids

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return b"".join(self.token_bytes[i] for i in ids)

    def decode(self, ids: Sequence[int]) -> str:
        return self.decode_bytes(ids).decode()


class Toy:
    """A tokenizer, a latent format and a way to make models and documents for them."""

    def __init__(self, runtime: Runtime, name: str, table: Sequence[bytes], max_latent_tokens: int) -> None:
        self.runtime = runtime
        self.tokenizer = ToyTokenizer(table)
        self.text = TextConfig(latent_format=name, max_latent_tokens=max_latent_tokens)  # type: ignore[arg-type]
        self.latents: LatentFormat = build_format(self.text, self.tokenizer)
        self.architecture = ModelConfig(
            num_layers=2,
            hidden_size=16,
            ffn_hidden_size=32,
            num_attention_heads=4,
            num_query_groups=2,
            head_dim=32,  # the smallest that vLLM computes
            context_length=64,
            init_std=0.3,
            tied_embeddings=False,
        )

    def document(self, code: str, name: str = "toy", **changes: Any) -> Document:
        return encode_document(code, name, self.tokenizer, self.latents, self.text, **changes)

    def model(self, seed: int = 0, lean: float = 0.0) -> LanguageModel:
        """Random weights; `lean` nats are added to the logits of all tokens that start a thought."""
        network = build_model(
            self.architecture, ParallelConfig(), self.runtime, self.tokenizer.vocab_size, self.latents.sets, seed
        )
        model = language_model(network)
        with torch.no_grad():
            model.embedding.word_embeddings.weight[:, 0] = 20.0  # dominates: the last norm makes about 4 of it
            model.output_layer.weight[:, 0] = 0.0
            model.output_layer.weight[self.thought_starts(), 0] = lean / 4
        return model

    def thought_starts(self) -> list[int]:
        """Tokens that decide to think on some line."""
        if self.latents.name == "tokens":
            return [self.tokenizer.special["<think>"]]
        return [i for i, token in enumerate(self.tokenizer.token_bytes) if token.lstrip().startswith(b"#")]

    def config(self, **sections: Any) -> RunConfig:
        return RunConfig(model=self.architecture, text=self.text, **sections)

    def thoughts_of(self, document: Document, line: int) -> list[tuple[int, ...] | None]:
        """Every latent of a line: None for <act>, or the sampled ids of a thought."""
        if not document.lines[line].may_think:
            return [None]
        first = document.lines[line].body[0]
        starts, inner, ends = self.rules(first)
        complete: list[tuple[int, ...] | None] = [None]
        open_ = [(token,) for token in starts]
        for _ in range(self.latents.max_thought_ids - 1):
            complete += [ids for ids in open_ if ids[-1] in ends]
            open_ = [(*ids, token) for ids in open_ if ids[-1] not in ends for token in inner]
        return complete + open_

    def transcripts(self, document: Document) -> Iterator[Transcript]:
        """Every transcript that a sampler can make of the document."""
        choices = [self.thoughts_of(document, line) for line in range(len(document.lines))]
        for latents in product(*choices):
            thoughts = {line: ids for line, ids in enumerate(latents) if ids is not None}
            yield compose(document, thoughts, self.latents, self.tokenizer)

    def rules(self, first: int) -> tuple[list[int], list[int], set[int]]:
        """From the bytes alone: tokens that start a thought where `first` is a line's first visible token, tokens
        that may follow, and tokens that end one."""
        table, special = self.tokenizer.token_bytes, self.tokenizer.special
        if self.latents.name == "tokens":
            end = special["</think>"]
            return [special["<think>"]], [*(i for i, token in enumerate(table) if token), end], {end}
        inner = [i for i, token in enumerate(table) if token and b"\n" not in token[:-1]]
        text = table[first].lstrip(WHITESPACE.encode())
        space = table[first][: len(table[first]) - len(text)]
        starts = [i for i in inner if table[i].startswith(space + b"#")]
        return starts, inner, {i for i in inner if table[i].endswith(b"\n")}

    def full_logits(self, model: LanguageModel, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """Logits behind every token of each row, fp64 [tokens, vocab], from one forward pass without a cache."""
        longest = max(len(row) for row in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.as_tensor([int(token) for token in row])
        positions = torch.arange(longest).expand_as(ids).contiguous()
        model.eval()
        hidden = model(TokenBatch(ids, positions, torch.zeros_like(ids), ids), hidden_only=True).transpose(0, 1)
        logits = model.logits(hidden)[..., : self.tokenizer.vocab_size].double()
        return [logits[number, : len(row)] for number, row in enumerate(rows)]

    def latent_log_probs(self, transcript: Transcript, logits: Tensor, temperature: float = 1.0) -> list[Tensor]:
        """log q(z_t | s_t) of each line by the rules of method.md (0 where there was no choice), differentiable."""
        log_p = (logits / temperature).log_softmax(-1)
        values = []
        for line in range(transcript.num_lines):
            if not transcript.offered[line]:
                values.append(torch.zeros((), dtype=torch.float64))
                continue
            here = (transcript.lines == line) & (transcript.roles == Role.EXPERT)
            starts, inner, _ = self.rules(int(transcript.ids[here][0]))
            position = int(transcript.decision_positions[line])
            think = log_p[position - 1][starts]
            if self.latents.name == "tokens":
                think = think - log_p[position - 1][[*starts, self.tokenizer.special["<act>"]]].logsumexp(-1)
            if not transcript.think[line]:
                values.append(torch.log1p(-think.exp().sum()))
                continue
            ids = self.thought_ids(transcript, line)
            total = think[starts.index(ids[0])]
            for offset, token in enumerate(ids[1:]):
                among = log_p[position + offset][inner]
                total = total + among[inner.index(token)] - among.logsumexp(-1)
            values.append(total)
        return values

    def token_log_probs(self, transcript: Transcript, logits: Tensor) -> Tensor:
        """log pi of every token of a transcript, fp64 [tokens] (0 for the first), as method.md scores a line: the first
        visible token, where it carries the decision, given that it starts no thought."""
        values = torch.zeros(transcript.num_tokens, dtype=torch.float64)
        for position in range(1, transcript.num_tokens):
            log_p = logits[position - 1].log_softmax(-1)
            token = int(transcript.ids[position])
            values[position] = log_p[token]
            if self.latents.name == "comment" and position in transcript.first_expert:
                starts = self.rules(token)[0]
                if token not in starts:  # else the line is a comment itself
                    values[position] -= torch.log1p(-log_p[starts].exp().sum())
        return values

    def thought_ids(self, transcript: Transcript, line: int) -> list[int]:
        """The sampled ids of a line's thought, its decision included."""
        position = int(transcript.decision_positions[line])
        return [int(token) for token in transcript.ids[position : transcript.thought_slice(line).stop]]


def log_probs_of(toy: Toy, model: LanguageModel, transcripts: Sequence[Transcript], temperature: float = 1.0) -> Tensor:
    """log q(all latents) of each transcript, fp64 [transcripts], without gradients."""
    found = []
    with torch.no_grad():
        for start in range(0, len(transcripts), 2000):
            part = transcripts[start : start + 2000]
            for transcript, logits in zip(part, toy.full_logits(model, [t.ids for t in part]), strict=True):
                found.append(sum(toy.latent_log_probs(transcript, logits, temperature)))
    return torch.stack([torch.as_tensor(value, dtype=torch.float64) for value in found])


def choice_positions(transcript: Transcript) -> np.ndarray:
    """Indices into `ids` of the tokens that show a sampled choice: offered decisions and THOUGHT tokens."""
    decisions = transcript.decision_positions[transcript.offered]
    thoughts = np.flatnonzero((transcript.roles == Role.THOUGHT) & transcript.offered[transcript.lines])
    return np.union1d(decisions, thoughts)
