"""A prompt stands before the first line: given, never a primitive action."""

import numpy as np
import pytest

from ra3_megatron.config.data import TextConfig
from ra3_megatron.corpus.indexed import to_document
from ra3_megatron.text.latents import build_format, code_text, compose, cut, encode_document, full_text, raw
from ra3_megatron.text.prompts import prompt_ids
from ra3_megatron.text.tokenizer import Tokenizer
from ra3_megatron.text.transcript import Role

PROMPT = 'def f(x):\n    """\n    # not a comment, a prompt\n    """\n'
CODE = "    y = x + 1\n    # a human comment\n    return y\n"
CONFIGS = (
    TextConfig(),
    TextConfig(granularity="statement"),
    TextConfig(latent_format="tokens"),
    TextConfig(granularity="token", token_span=3, latent_format="tokens"),
)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_prompt_is_context_and_comes_back(config: TextConfig, tokenizer: Tokenizer) -> None:
    format = build_format(config, tokenizer)
    document = encode_document(CODE, "d", tokenizer, format, config, prompt=PROMPT)
    plain = encode_document(CODE, "d", tokenizer, format, config)
    assert document.lines == plain.lines, "the lines are those of the code alone"
    transcript = raw(document, format, tokenizer)
    given = 1 + len(tokenizer.encode(PROMPT))
    assert (transcript.roles[:given] == Role.CONTEXT).all() and (transcript.roles[given:] != Role.CONTEXT).all()
    assert (transcript.lines[:given] == -1).all() and transcript.lines[given] == 0
    assert transcript.is_given.sum() == given and not (transcript.is_given & transcript.is_code).any()
    assert code_text(transcript, tokenizer) == PROMPT + CODE.replace("    # a human comment\n", "")
    assert to_document(transcript, format, tokenizer) == document
    line = next(index for index, line in enumerate(document.lines) if line.may_think)
    if config.latent_format == "comment":
        thought = format.thought("hm", document.lines[line], "    ", tokenizer)
        thinking = compose(document, {line: thought}, format, tokenizer)
        assert full_text(thinking, tokenizer) == PROMPT + "    # hm\n" + CODE.replace("    # a human comment\n", "")
        assert code_text(thinking, tokenizer) == code_text(transcript, tokenizer)


def test_the_prompt_takes_room_in_the_context(tokenizer: Tokenizer) -> None:
    config = TextConfig()
    format = build_format(config, tokenizer)
    document = encode_document(CODE, "d", tokenizer, format, config, prompt=PROMPT)
    length = raw(document, format, tokenizer).num_tokens
    whole, shorter = cut(document, length, format), cut(document, length - 2, format)
    assert whole == document
    assert shorter is not None and len(shorter.lines) < len(document.lines) and shorter.prompt == document.prompt
    assert cut(document, 1 + len(document.prompt), format) is None
    assert np.array_equal(raw(shorter, format, tokenizer).ids[1 : 1 + len(document.prompt)], document.prompt)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_prompt_is_read_as_code_was_read_in_training(config: TextConfig, tokenizer: Tokenizer) -> None:
    """With markers, the ids of a prompt of whole lines begin the transcript of a document that begins with it."""
    format = build_format(config, tokenizer)
    prompt, rest = "def f(x):\n    y = x + 1\n", "    return y\n"
    plain = [tokenizer.bos, *tokenizer.encode(prompt)]
    assert prompt_ids(prompt, "p", False, tokenizer, format, config) == plain
    ids = prompt_ids(prompt, "p", True, tokenizer, format, config)
    if config.latent_format == "comment":
        assert ids == plain
        return
    document = encode_document(prompt + rest, "d", tokenizer, format, config)
    assert ids == raw(document, format, tokenizer).ids.tolist()[: len(ids)] and ids != plain
