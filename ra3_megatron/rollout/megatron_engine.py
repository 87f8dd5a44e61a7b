"""The first rollout engine: key/value-cached sampling on the live Megatron model.

It holds no copy of the weights: what the trainer changes is what it samples from, and `weight_version` is the
trainer's count. Every process of a replica of the model (its tensor-parallel ranks and pipeline stages) runs the same
calls. On the last stage single positions' logits are gathered to sample from (probabilities of events are not: they
stay vocabulary-parallel), and the choices of its rank 0 are everybody's.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ra3_megatron.mcore.model import chunks_of
from ra3_megatron.mcore.startup import Runtime
from ra3_megatron.mcore.vocab_parallel import event_log_probs
from ra3_megatron.rollout.decode_graphs import DecodeGraphs, Decoding, GraphDecoding, PlainDecoding
from ra3_megatron.rollout.kv_session import KVSession, to_device
from ra3_megatron.rollout.protocol import (
    Completion,
    Finish,
    GenerateRequest,
    LatentCompletion,
    LatentRequest,
    Uniforms,
    first_thought,
)
from ra3_megatron.rollout.stage_choice import StageChoice
from ra3_megatron.rollout.stage_pass import StagePass
from ra3_megatron.text.latents import LatentFormat


class MegatronEngine:
    """Samples from `model` (any wrapper of LanguageModel) at `temperature`.

    share_first_pass: equal new sequences, as the transcripts of one document are, are computed once. cuda_graphs:
    passes of one token a row are recorded (see `decode_graphs`). direct: see `StagePass`.
    """

    piece = 16

    def __init__(
        self,
        model: torch.nn.Module,
        runtime: Runtime,
        latents: LatentFormat,
        vocab_size: int,
        temperature: float = 1.0,
        share_first_pass: bool = True,
        cuda_graphs: bool = False,
        direct: bool = True,
    ) -> None:
        self.stage = StagePass(model, runtime, direct)
        self.vocabulary = chunks_of(model)[-1].vocabulary
        self.runtime = runtime
        self.latents = latents
        self.temperature = temperature
        self.share_first_pass = share_first_pass
        self.weight_version = 0
        sets = torch.as_tensor(latents.sets, device=runtime.device)
        self.choose = StageChoice(self.stage, sets, vocab_size, temperature)
        self.graphs = DecodeGraphs(self.stage, self.choose) if cuda_graphs else None
        """None: every kernel is started by the host."""
        self._session = KVSession(self.stage)
        self._keys: list[int] = []
        self._cached: list[list[int]] = []
        self._free = KVSession(self.stage)
        self._held: list[tuple[int, ...]] = []
        """Prompt and continuation so far of each row of `_free`; their last token was not fed yet."""

    def forget(self) -> None:
        self._forget_transcripts()
        self._held = []
        self._free.open(0)

    def _forget_transcripts(self) -> None:
        self._keys, self._cached = [], []
        self._session.open(0)

    def finish(self) -> None:
        self.stage.finish()

    # -- free continuation ----------------------------------------------------------------------------------------

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        self._forget_transcripts()
        ids: list[list[int]] = [[] for _ in requests]
        log_probs: list[list[float]] = [[] for _ in requests]
        finish = [Finish.LENGTH] * len(requests)
        rows, hidden = self._open(requests)
        growing = list(range(len(rows)))  # of the session's rows, those that get another token
        decoding = self._decoding(self._free, max((len(requests[i].uniforms) for i in rows), default=0))
        last: list[list[int]] | None = None  # of each row, what is to be fed first
        while growing:
            active = [rows[place] for place in growing]
            sets = [requests[i].allowed for i in active]
            draws = np.array([requests[i].uniforms[len(ids[i])] for i in active])
            greedy, top_p = [requests[i].greedy for i in active], [requests[i].top_p for i in active]
            if last is None:
                tokens, values = self._sample(hidden, sets, sets, draws, greedy, top_p)
            else:
                tokens, values = self._next(decoding, last, sets, draws, greedy, top_p)
            for i, token, value in zip(active, tokens, values, strict=True):
                ids[i].append(token)
                log_probs[i].append(value)
                if token in requests[i].stop:
                    finish[i] = Finish.END
            full = [len(ids[i]) == len(requests[i].uniforms) for i in rows]
            left = [
                p for p, i in enumerate(rows) if finish[i] is not Finish.END and (requests[i].goes_on or not full[p])
            ]
            decoding.select(left)
            rows, full = [rows[place] for place in left], [full[place] for place in left]
            growing = [place for place in range(len(rows)) if not full[place]]
            last = [[] if full[p] else [ids[i][-1]] for p, i in enumerate(rows)]
        decoding.close()
        self._held = [(*requests[i].prompt, *ids[i]) for i in rows]
        return [Completion(a, b, c, self.weight_version) for a, b, c in zip(ids, log_probs, finish, strict=True)]

    def _open(self, requests: Sequence[GenerateRequest]) -> tuple[list[int], Tensor]:
        """The session's rows as numbers of requests, and the hidden state behind each prompt. What goes on with a row
        that is held feeds its last token alone; equal prompts share a pass."""
        held = {ids: row for row, ids in enumerate(self._held)}
        asked = {i: tuple(request.prompt) for i, request in enumerate(requests) if len(request.uniforms)}
        going = [i for i, prompt in asked.items() if prompt in held]
        new = [i for i, prompt in asked.items() if prompt not in held]
        self._free.select([held[asked[i]] for i in going])
        states = [self._free.feed([[asked[i][-1]] for i in going])[0]] if going else []
        if new:
            prompts: dict[tuple[int, ...], int] = {}
            places = [prompts.setdefault(asked[i], len(prompts)) for i in new]
            session = KVSession(self.stage)
            session.open(len(prompts))
            hidden, starts = session.feed([list(prompt) for prompt in prompts])
            last = [start + len(prompt) - 1 for start, prompt in zip(starts, prompts, strict=True)]
            states.append(hidden[torch.tensor([last[place] for place in places], device=hidden.device)])
            session.select(places)
            self._free.append(session)
        return going + new, torch.cat(states) if states else torch.empty(0)

    # -- jump-ahead -----------------------------------------------------------------------------------------------

    def advance(self, requests: Sequence[LatentRequest]) -> list[LatentCompletion]:
        sequences, decision_places = _layout(requests)
        # the hidden state behind the token before the first decision is needed, so that token is always fed
        heads = [places[0] - 1 for places in decision_places]
        hidden, starts = self._teacher_force([r.key for r in requests], sequences, heads)
        act_log_probs, at_decision = self._decide(requests, hidden, starts, decision_places)
        thinking = [first_thought(request, values) for request, values in zip(requests, act_log_probs, strict=True)]
        thoughts = self._think(requests, thinking, sequences, decision_places, at_decision)
        completions = []
        for i in range(len(requests)):
            line = thinking[i]
            ids, values, finish = thoughts.get(i, ([], [], Finish.ACT))
            decided = act_log_probs[i] if line is None else act_log_probs[i][:line]
            completions.append(LatentCompletion(decided, line, ids, values, finish, self.weight_version))
        return completions

    def _teacher_force(self, keys: list[int], sequences: list[list[int]], heads: list[int]) -> tuple[Tensor, list[int]]:
        """Feed what the caches do not hold yet, from `heads` on in any case; all of it in one pass.

        Returns hidden states [T, hidden], and for each request where its position 0 would stand in them.
        """
        session, known = self._session, {key: row for row, key in enumerate(self._keys)}
        old = [i for i, key in enumerate(keys) if key in known]
        new = [i for i, key in enumerate(keys) if key not in known]
        session.select([known[keys[i]] for i in old])
        shared = [_common(self._cached[known[keys[i]]], sequences[i][: heads[i]]) for i in old]
        session.cut(shared)
        rows = {i: row for row, i in enumerate(old)}
        first: dict[object, int] = {}
        for i in new:
            same = tuple(sequences[i]) if self.share_first_pass else i
            rows[i] = first.setdefault(same, len(old) + len(first))
        whole = {rows[i]: sequences[i] for i in new}
        session.extend(len(whole))
        rest = [sequences[i][n:] for i, n in zip(old, shared, strict=True)]
        hidden, begins = session.feed([*rest, *whole.values()])
        skipped = dict(zip(old, shared, strict=True))
        starts = [begins[rows[i]] - skipped.get(i, 0) for i in range(len(keys))]
        session.select([rows[i] for i in range(len(keys))])
        self._keys, self._cached = list(keys), [list(s) for s in sequences]
        return hidden, starts

    def _decide(
        self, requests: Sequence[LatentRequest], hidden: Tensor, starts: list[int], places: list[list[int]]
    ) -> tuple[list[list[float]], dict[tuple[int, int], Tensor]]:
        """log q(<act>) of every line of every request, and the hidden state behind each choice."""
        wanted = [(i, t) for i, r in enumerate(requests) for t, line in enumerate(r.lines) if line.offered]
        values = [[0.0] * len(r.lines) for r in requests]
        states: dict[tuple[int, int], Tensor] = {}
        if not wanted:
            return values, states
        # the token before the decision predicts it
        ahead = np.array([starts[i] + places[i][t] - 1 for i, t in wanted])
        acts = np.array([self.latents.act_set(requests[i].lines[t].think_set) for i, t in wanted])
        index, act = to_device([ahead, acts], hidden.device)
        chosen = hidden[index]
        log_act = self.runtime.agree(self._act_log_probs(chosen, act))
        for (i, t), value, state in zip(wanted, log_act.tolist(), chosen, strict=True):
            values[i][t] = value
            states[i, t] = state
        return values, states

    def _think(
        self,
        requests: Sequence[LatentRequest],
        thinking: list[int | None],
        sequences: list[list[int]],
        places: list[list[int]],
        at_decision: dict[tuple[int, int], Tensor],
    ) -> dict[int, tuple[list[int], list[float], Finish]]:
        """Sample the thought of each request that takes one; leaves the caches just behind it."""
        active = [(i, t) for i, t in enumerate(thinking) if t is not None]
        if not active:
            return {}
        rows = [i for i, _ in active]
        session = self._session if len(rows) == self._session.rows else self._session.split(rows)
        cached = [sequences[i][: places[i][t]] for i, t in active]
        kept = [len(ids) for ids in cached]
        session.cut(kept)
        start = [requests[i].lines[t].think_set for i, t in active]
        states = torch.stack([at_decision[i, t] for i, t in active])
        draws = np.array([requests[i].uniforms[t, 1] for i, t in active])
        tokens, values = self._sample(states, start, [self.latents.universe] * len(active), draws)
        ids = [[token] for token in tokens]
        log_probs = [[value] for value in values]
        limits = [requests[i].uniforms.shape[1] - 1 for i, _ in active]
        live = [k for k in range(len(active)) if not self.latents.ends[ids[k][-1]] and limits[k] > 1]
        decoding = self._decoding(session, max(limits)) if live else None
        while live:
            assert decoding is not None
            growing = set(live)
            feed = [ids[k][-1:] if k in growing else [] for k in range(len(active))]
            for k in live:
                cached[k].append(ids[k][-1])
            draws = np.array([requests[active[k][0]].uniforms[active[k][1], 1 + len(ids[k])] for k in live])
            inner = [self.latents.thought_set] * len(live)
            tokens, values = self._next(decoding, feed, inner, draws)
            for k, token, value in zip(live, tokens, values, strict=True):
                ids[k].append(token)
                log_probs[k].append(value)
            live = [k for k in live if not self.latents.ends[ids[k][-1]] and len(ids[k]) < limits[k]]
        if decoding is not None:
            decoding.close()
        if session is not self._session:
            self._session.replace(rows, session, kept)
        for (i, _), now in zip(active, cached, strict=True):
            self._cached[i] = now
        finish = [Finish.END if self.latents.ends[row[-1]] else Finish.LENGTH for row in ids]
        return {i: (ids[k], log_probs[k], finish[k]) for k, (i, _) in enumerate(active)}

    def _decoding(self, session: KVSession, more: int) -> Decoding:
        """The rows of a session, to grow by at most `more` tokens each."""
        if self.graphs is None or not session.rows:
            return PlainDecoding(session)
        return self.graphs.decoding(session, more)

    # -- sampling -------------------------------------------------------------------------------------------------

    def _act_log_probs(self, hidden: Tensor, act: Tensor) -> Tensor:
        """log P(token of the sets `act`) behind hidden states, [n]; meaningful on the last stage."""
        if not self.runtime.is_last_stage:
            return torch.zeros(len(act), device=hidden.device)
        return event_log_probs(
            self.stage.logits(hidden).float() / self.temperature,
            torch.zeros_like(act),
            self.vocabulary,
            act,
            torch.full_like(act, self.latents.universe),
            entropy=False,
            overwrite=True,
        )[0]

    def _next(
        self,
        decoding: Decoding,
        feed: Sequence[Sequence[int]],
        sets: Sequence[int],
        draws: Uniforms,
        greedy: Sequence[bool] | None = None,
        top_p: Sequence[float] | None = None,
    ) -> tuple[list[int], list[float]]:
        """Feed a token to some rows of a decoding, and sample what follows each, within rows `sets` of the table."""
        plain = not any(greedy or ()) and min(top_p or (1.0,)) >= 1
        if plain and isinstance(decoding, GraphDecoding) and decoding.draws:
            return decoding.draw(feed, sets, draws)
        return self._sample(decoding.feed(feed)[0], sets, sets, draws, greedy, top_p)

    def _sample(
        self,
        hidden: Tensor,
        allowed: Sequence[int],
        universe: Sequence[int],
        draws: Uniforms,
        greedy: Sequence[bool] | None = None,
        top_p: Sequence[float] | None = None,
    ) -> tuple[list[int], list[float]]:
        """Tokens sampled within rows `allowed` of the token sets, and their log-probabilities within rows `universe`.

        hidden [n, hidden]; allowed, universe [n]; draws [n] uniforms.
        """
        if self.runtime.is_last_stage:
            # the uniforms cross with the rest, as the bits that they are
            asked = [np.array(allowed), np.array(universe), draws.view(np.int64)]
            within, of, uniforms = to_device(asked, hidden.device)
            chosen = self.choose(hidden, within, of, uniforms, greedy, top_p)
        else:
            chosen = torch.zeros(2, len(allowed), dtype=torch.float64, device=hidden.device)
        tokens, values = self.runtime.agree(chosen).tolist()
        return [int(token) for token in tokens], values


def _layout(requests: Sequence[LatentRequest]) -> tuple[list[list[int]], list[list[int]]]:
    """Teacher-forced ids of each request, and the position at which each line's decision is read."""
    sequences, places = [], []
    for request in requests:
        ids = list(request.context)
        where = []
        for line in request.lines:
            ids += line.before
            where.append(len(ids))
            ids += line.act
        sequences.append(ids)
        places.append(where)
    return sequences, places


def _common(cached: list[int], wanted: list[int]) -> int:
    """Length of the common prefix."""
    limit = min(len(cached), len(wanted))
    for n in range(limit):
        if cached[n] != wanted[n]:
            return n
    return limit
