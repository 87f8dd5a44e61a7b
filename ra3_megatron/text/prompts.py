"""Prompts as the model has read such text in training."""

from dataclasses import replace

from ra3_megatron.config.data import TextConfig
from ra3_megatron.text.latents import LatentFormat, encode_document, raw
from ra3_megatron.text.tokenizer import Tokenizer


def prompt_ids(
    prompt: str, name: str, code: bool, tokenizer: Tokenizer, latents: LatentFormat, text: TextConfig
) -> list[int]:
    """Ids of a prompt, [bos, …].

    Where each line of code has a marker of its own (format `tokens`), so have the lines of a prompt that is code.
    """
    if latents.implicit_decision or not code or not prompt.strip():
        return [tokenizer.bos, *tokenizer.encode(prompt)]
    document = encode_document(prompt, name, tokenizer, latents, text, human_comments="keep")
    return raw(replace(document, complete=False), latents, tokenizer).ids.tolist()
