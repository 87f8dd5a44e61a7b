"""What is trained on: the corpus, its tokenizer, primitive actions and the format of latents."""

from typing import Literal

from pydantic import Field, model_validator

from ra3_megatron.config.base import Section
from ra3_megatron.config.tasks import TasksConfig
from ra3_megatron.config.yaml_io import scalar_text

HumanComments = Literal["keep", "strip", "as_thoughts"]


class CorpusConfig(Section):
    """Where the expert text comes from and which documents of it are used."""

    source: Literal["installed", "folder", "jsonl", "parquet", "text", "hub", "tasks"] = "installed"
    """`installed`: functions of the Python code on this machine (the interpreter's standard library and
    `packages`); `folder`: `*.py` files below `path`; `jsonl` / `parquet`: rows with a field `text_field`;
    `text`: one document a file, separated by blank-line-delimited `document_separator` when that is set;
    `hub`: a data set name or local folder that `datasets.load_dataset` understands; `tasks`: generated tasks with
    known abstractions (`corpus.tasks`)."""

    tasks: TasksConfig = TasksConfig()
    """Generated tasks."""

    path: str | None = None
    """File, folder or glob (`folder`, `jsonl`, `parquet`, `text`) or data set name (`hub`)."""

    packages: list[str] = []
    """Importable packages whose code is added to the standard library (`installed` only)."""

    unit: Literal["function", "file"] = "function"
    """Python sources are cut into top-level functions and methods, or taken as whole files."""

    text_field: str = "text"
    """Column that holds the text (`jsonl`, `parquet`, `hub`)."""

    document_separator: str | None = None
    """A line that separates documents inside one file (`text`); none: one document a file."""

    hub_config: str | None = None
    """Configuration name of a hub data set."""

    hub_split: str = "train"
    """Split of a hub data set."""

    streaming: bool = False
    """Stream a hub data set instead of downloading it (`hub` only). Every other source is read lazily in any case, so
    a corpus may be larger than memory."""

    shard_documents: int = Field(default=10_000, ge=1)
    """Documents a shard when building the indexed data set; bounds the memory used."""

    min_lines: int = Field(default=3, ge=1)
    """Shortest document, in non-blank lines."""

    max_lines: int = Field(default=30, ge=1)
    """Longest document, in non-blank lines."""

    max_documents: int | None = Field(default=None, ge=1)
    """Keep at most this many documents (the first ones in the order of their content hash)."""

    valid_fraction: float = Field(default=0.05, gt=0.0, lt=1.0)
    """Share held out, by hash of the path, so that no file of code is in both splits (of the row or document, for
    files that hold many: `jsonl`, `parquet`, `hub`, separated `text`)."""

    human_comments: HumanComments = "strip"
    """Full-line comments in the mid-training text. They cannot be told from thoughts in the `comment` format,
    so there they are stripped or taken `as_thoughts` (observed latents); `keep` is for the `tokens` format."""

    warm_start_comments: HumanComments = "keep"
    """Full-line comments in the warm-start text (kept, so that a model from scratch knows what comments are). With the
    `tokens` format `as_thoughts` puts them between its reserved tokens: a model from scratch has thoughts to sample."""

    too_long: Literal["cut", "drop"] = "cut"
    """A document longer than the context is cut at a line boundary or dropped; both are counted."""

    @model_validator(mode="after")
    def _check(self) -> "CorpusConfig":
        problems = [
            f"corpus.{key}={getattr(self, key)} is not read with corpus.source={self.source}: it goes with {source}"
            for key, source in (("packages", "installed"), ("document_separator", "text"), ("hub_config", "hub"))
            if getattr(self, key) and self.source != source
        ]
        problems += self._unread()
        needs_path = self.source not in ("installed", "tasks")
        if not needs_path and self.path is not None:
            problems.append(f"corpus.path={self.path} is not read with corpus.source={self.source}: use folder, say")
        if needs_path and not self.path:
            problems.append(f"corpus.path is missing: corpus.source={self.source} needs one")
        if self.max_lines < self.min_lines:
            problems.append(f"corpus.max_lines={self.max_lines} is below corpus.min_lines={self.min_lines}")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _unread(self) -> list[str]:
        """Keys with a default that the source does not read."""
        goes_with = {"unit": ("installed", "folder"), "hub_split": ("hub",), "streaming": ("hub",)}
        return [
            f"corpus.{key}={scalar_text(getattr(self, key))} is not read with corpus.source={self.source}: "
            f"it goes with {', '.join(sources)}"
            for key, sources in goes_with.items()
            if self.source not in sources and getattr(self, key) != type(self).model_fields[key].default
        ]


class TokenizerConfig(Section):
    """The tokenizer: trained on the corpus, or read from disk."""

    kind: Literal["sentencepiece", "hf"] = "sentencepiece"
    """`sentencepiece`: a BPE model that takes a text as it is (no normalisation, no space before it); `hf`: a
    `tokenizer.json` (any fast tokenizer)."""

    path: str | None = None
    """Existing model to use (`*.model`, `tokenizer.json` or its folder); none: train one on the corpus."""

    vocab_size: int = Field(default=4096, ge=300)
    """Pieces of the tokenizer to train."""

    train_bytes: int = Field(default=20_000_000, ge=1000)
    """Train on at most this many bytes of the training split."""

    superwords: bool = False
    """Pieces of the tokenizer to train may hold spaces, letters and punctuation together, so that a frequent line of
    code is one piece."""

    @model_validator(mode="after")
    def _check(self) -> "TokenizerConfig":
        if self.kind == "hf" and self.path is None:
            raise ValueError("tokenizer.path is missing: tokenizer.kind=hf needs a tokenizer.json or its folder")
        if self.kind == "hf" and self.superwords:
            raise ValueError(
                "tokenizer.superwords=true is not read with tokenizer.kind=hf: its pieces are there already; set it to "
                "false"
            )
        return self


class TextConfig(Section):
    """Primitive actions and the format in which latents are written between them."""

    granularity: Literal["line", "statement", "token"] = "line"
    """A primitive action is a line, a logical line (statement), or a span of at most `token_span` tokens of a line."""

    token_span: int = Field(default=8, ge=1)
    """Tokens in a primitive action (`granularity=token` only)."""

    latent_format: Literal["comment", "tokens"] = "comment"
    """`comment`: a thought is a comment line above the line it governs, no new vocabulary;
    `tokens`: reserved `<think>…</think>` and `<act>` markers."""

    max_latent_tokens: int = Field(default=12, ge=1)
    """A thought is at most this many sampled tokens; then its end is forced (and carries no gradient)."""

    keep_latents: bool = True
    """Earlier thoughts stay in the context. Off: the context of a line holds the thought in force and the expert's
    lines before it without theirs (a transcript is then read as one sequence for each of its thoughts)."""

    @model_validator(mode="after")
    def _check(self) -> "TextConfig":
        if self.granularity == "token" and self.latent_format == "comment":
            raise ValueError(
                "text.granularity=token does not go with text.latent_format=comment "
                "(a comment needs a line of its own): use text.latent_format=tokens"
            )
        return self
