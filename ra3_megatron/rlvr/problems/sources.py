"""The problems that a configuration names."""

from collections.abc import Sequence
from dataclasses import dataclass

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.run import RunConfig
from ra3_megatron.rlvr.problems.competition import competition_problems
from ra3_megatron.rlvr.problems.decontamination import Report, decontaminate
from ra3_megatron.rlvr.problems.generated import generated_problems
from ra3_megatron.rlvr.problems.jsonl import jsonl_problems
from ra3_megatron.rlvr.problems.mbpp import mbpp_problems
from ra3_megatron.rlvr.problems.problem import Problem
from ra3_megatron.text.latents import LatentFormat
from ra3_megatron.text.prompts import prompt_ids
from ra3_megatron.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Problems:
    """The problems of a run."""

    train: list[Problem]
    held_out: list[Problem]
    decontamination: Report | None
    """What was left out of the training problems; None: they were compared with nothing."""
    left_out: dict[str, int]
    """Rows of the source that cannot be graded, and tasks that cannot be held out, by reason."""


def load_problems(config: RunConfig) -> Problems:
    """The problems of a run. Raises UserError when there are none, or they cannot be read."""
    asked = config.rlvr.problems
    left_out: dict[str, int] = {}
    if asked.source == "tasks":
        if config.corpus.source != "tasks":
            raise UserError(
                f"rlvr.problems.source=tasks needs corpus.source=tasks, not {config.corpus.source}: or set "
                "rlvr.problems.source to mbpp or jsonl"
            )
        train, held_out, left_out = generated_problems(config.corpus, asked.limit, asked.held_out)
        found = train, held_out
    else:
        assert asked.path is not None
        if asked.source == "mbpp":
            found = mbpp_problems(asked.path, asked.limit, asked.held_out)
        elif asked.source == "jsonl":
            found = jsonl_problems(asked.path, asked.limit, asked.held_out)
        else:
            train, held_out, left_out = competition_problems(asked.path, asked.source, asked.limit, asked.held_out)
            found = train, held_out
    train, report = found[0], None
    if asked.benchmarks is not None:
        train, report = decontaminate(train, asked.benchmarks)
    if not train:
        left = f": all {len(found[0])} share text with a benchmark" if found[0] else ""
        raise UserError(f"rlvr.problems.source={asked.source}: there is no problem to train on{left}")
    return Problems(train, found[1], report, left_out)


def encode_prompts(
    problems: Sequence[Problem], tokenizer: Tokenizer, latents: LatentFormat, config: RunConfig
) -> list[list[int]]:
    """Ids of each problem's prompt, [bos, prompt …], as the model has read it in training: code where the response goes
    on with its program; what stands before the first line of a document where it is that of a generated task.

    Raises UserError when one leaves no room for a response.
    """
    max_response, context = config.rlvr.max_response_tokens, config.model.context_length
    given = config.rlvr.problems.source == "tasks"
    prompts = [
        prompt_ids(each.prompt, each.name, each.answer == "continues" and not given, tokenizer, latents, config.text)
        for each in problems
    ]
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]), default=None)
    if longest is not None and len(prompts[longest]) + max_response > context:
        raise UserError(
            f"model.context_length={context}: problem {problems[longest].name} has {len(prompts[longest])} tokens, "
            f"and a response up to rlvr.max_response_tokens={max_response}: lower that, or leave the problem out"
        )
    return prompts
