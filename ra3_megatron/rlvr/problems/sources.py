"""The problems that a configuration names."""

from collections.abc import Sequence

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.run import RunConfig
from ra3_megatron.rlvr.problems.generated import generated_problems
from ra3_megatron.rlvr.problems.jsonl import jsonl_problems
from ra3_megatron.rlvr.problems.mbpp import mbpp_problems
from ra3_megatron.rlvr.problems.problem import Problem
from ra3_megatron.text.tokenizer import Tokenizer


def load_problems(config: RunConfig) -> tuple[list[Problem], list[Problem]]:
    """Training and held-out problems. Raises UserError when there are none, or they cannot be read."""
    asked = config.rlvr.problems
    if asked.source == "tasks":
        if config.corpus.source != "tasks":
            raise UserError(
                f"rlvr.problems.source=tasks needs corpus.source=tasks, not {config.corpus.source}: or set "
                "rlvr.problems.source to mbpp or jsonl"
            )
        found = generated_problems(config.corpus, asked.limit, asked.held_out)
    else:
        assert asked.path is not None
        read = mbpp_problems if asked.source == "mbpp" else jsonl_problems
        found = read(asked.path, asked.limit, asked.held_out)
    if not found[0]:
        raise UserError(f"rlvr.problems.source={asked.source}: there is no problem to train on")
    return found


def encode_prompts(
    problems: Sequence[Problem], tokenizer: Tokenizer, max_response: int, context: int
) -> list[list[int]]:
    """Ids of each problem's prompt, [bos, prompt …]. UserError when one leaves no room for a response."""
    prompts = [[tokenizer.bos, *tokenizer.encode(problem.prompt)] for problem in problems]
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]), default=None)
    if longest is not None and len(prompts[longest]) + max_response > context:
        raise UserError(
            f"model.context_length={context}: problem {problems[longest].name} has {len(prompts[longest])} tokens, "
            f"and a response up to rlvr.max_response_tokens={max_response}: lower that, or leave the problem out"
        )
    return prompts
