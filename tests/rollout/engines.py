"""The engines that go through the contract of protocol.py."""

from collections.abc import Callable
from dataclasses import dataclass

from toy import Toy
from vllm_processes import client_for, publish

from ra3_megatron.mcore.model import LanguageModel
from ra3_megatron.rollout.megatron_engine import MegatronEngine
from ra3_megatron.rollout.protocol import RolloutEngine
from ra3_megatron.rollout.vllm.engine import VllmEngine


@dataclass
class Candidate:
    """An engine that is put through the contract, and the model that it must agree with."""

    engine: RolloutEngine
    model: LanguageModel
    send: Callable[[LanguageModel, int], None]
    """Makes the engine sample with a model's weights, under a version."""

    def publish(self, weights: LanguageModel, version: int) -> None:
        """Change the model's weights and make the engine sample with them."""
        self.model.load_state_dict(weights.state_dict())
        self.send(self.model, version)


def megatron(toy: Toy, model: LanguageModel, temperature: float) -> Candidate:
    engine = MegatronEngine(model, toy.runtime, toy.latents, toy.tokenizer.vocab_size, temperature)

    def send(_: LanguageModel, version: int) -> None:  # it samples from the live model
        engine.weight_version = version
        engine.forget()

    return Candidate(engine, model, send)


def vllm(toy: Toy, model: LanguageModel, temperature: float) -> Candidate:
    engine = VllmEngine(client_for(toy), toy.latents, temperature)

    def send(weights: LanguageModel, version: int) -> None:
        publish(engine, weights, toy.architecture, version)

    send(model, 0)
    return Candidate(engine, model, send)


Maker = Callable[[Toy, LanguageModel, float], Candidate]

ENGINES: dict[str, Maker] = {"megatron": megatron, "vllm": vllm}
"""Another engine joins the contract by a line here."""
