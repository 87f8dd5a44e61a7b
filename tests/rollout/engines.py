"""The engines that go through the contract of protocol.py."""

from collections.abc import Callable
from dataclasses import dataclass

from toy import Toy

from ra3_megatron.mcore.model import LanguageModel
from ra3_megatron.rollout.megatron_engine import MegatronEngine
from ra3_megatron.rollout.protocol import RolloutEngine


@dataclass
class Candidate:
    """An engine that is put through the contract, and the model that it must agree with."""

    engine: RolloutEngine
    model: LanguageModel

    def publish(self, weights: LanguageModel, version: int) -> None:
        """Change the model's weights and make the engine sample with them."""
        self.model.load_state_dict(weights.state_dict())
        self.engine.weight_version = version
        self.engine.forget()


def megatron(toy: Toy, model: LanguageModel, temperature: float) -> Candidate:
    engine = MegatronEngine(model, toy.runtime, toy.latents, toy.tokenizer.vocab_size, temperature)
    return Candidate(engine, model)


Maker = Callable[[Toy, LanguageModel, float], Candidate]

ENGINES: dict[str, Maker] = {"megatron": megatron}
"""Another engine joins the contract by a line here."""
