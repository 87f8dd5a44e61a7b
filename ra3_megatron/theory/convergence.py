"""Do longer abstractions need fewer iterations? Value iteration, policy iteration and policy gradients are counted.

The paper's bound, N >= log(R_max / (eps (1 - gbar))) / (1 - gbar) (arXiv 2509.25810), falls as abstractions get longer.
Here the length tau of all abstractions is swept and the iterations to an eps-optimal value among them are counted:
max_s |V_n - V*| <= eps for value iteration, max_s V* - V^pi <= eps for the others, eps a share of max_s V*.

Families of problems, several random ones each:
- `expert`: in random MDPs, take one of the primitive actions, then follow the optimal policy. V* and Q* are the same
  for every tau; only gbar = gamma^tau changes. This isolates what the bound speaks of.
- `repeats_random`: in random MDPs, repeat one primitive action tau times. V* changes with tau.
- `repeats_grid`: the same in gridworlds with a random goal.

The gain of an algorithm from length is summed up as the slope of log N on log(bound) over tau: 1 means that N falls as
the bound does, 0 that tau does not matter. An iteration is one exact update, whatever tau is: primitive steps are not
counted.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ra3_megatron.theory.findings import Cell, Done, Outcome, Study, Verdict, nothing, verdict
from ra3_megatron.theory.mdp import MDP, Array, gridworld, random_mdp
from ra3_megatron.theory.options import OptionModel, action_repeats, expert_routines, option_model, primitive_options
from ra3_megatron.theory.planning import iteration_bound, optimal_values, policy_iteration, value_iteration
from ra3_megatron.theory.policy_gradient import Ascent, iterations_to_reach
from ra3_megatron.theory.statistics import Estimate, bootstrap, slope

LENGTHS = (1, 2, 4, 8, 16)
DISCOUNT = 0.95
STATES, ACTIONS, BRANCHING = 20, 4, 3
GRID_SIDE, SLIP = 5, 0.1
FAMILIES = ("expert", "repeats_random", "repeats_grid")
TOLERANCES = (0.01, 0.001)
"""eps as shares of max_s V*; the first one is the headline."""
PG_STEPS = (30.0, 300.0, 3000.0)
"""Step sizes of the policy gradient, in units of 1 / max_s V* of the primitive actions."""
FIXED_STEP = 30.0
NATURAL_STEP = 1.0
LIMIT = 4000
"""Updates after which an ascent is given up."""
UNITS = len(FAMILIES) * (len(PG_STEPS) + 4)
SAME = 0.8
"""An algorithm has the bound's speed-up when the 95% interval of its slope lies above this."""

ALGORITHMS = {
    "value_iteration": "value iteration",
    "policy_iteration": "policy iteration",
    "policy_gradient": "policy gradient, one step size",
    "policy_gradient_best": "policy gradient, best step size of each run",
    "natural": "natural policy gradient, one step size",
    "natural_gamma": "natural policy gradient, steps growing by 1/gamma",
    "natural_gbar": "natural policy gradient, steps growing by 1/gbar",
}


@dataclass(frozen=True)
class Sweep:
    """The problems of one family: B = seeds * lengths stacked models, the lengths of one seed side by side."""

    models: OptionModel
    best: Array
    """V*, [B, S]."""
    gbar: Array
    """[B]."""
    largest_reward: Array
    """R_max, [B]."""
    scale: Array
    """max_s V* of the primitive actions, [B]: the same for all lengths of a seed."""
    pruning_error: Array
    """max_s of V* of the primitive actions minus V*, as a share of `scale`, [B]."""

    def tolerance(self, share: float) -> Array:
        """eps, [B]."""
        return share * self.best.max(-1)


def problem(family: str, rng: np.random.Generator) -> MDP:
    """A random MDP of the family."""
    if family == "repeats_grid":
        return gridworld(GRID_SIDE, int(rng.integers(GRID_SIDE**2)), SLIP, DISCOUNT)
    return random_mdp(rng, STATES, ACTIONS, BRANCHING, DISCOUNT)


def abstractions(family: str, mdp: MDP, length: int) -> OptionModel:
    """The family's abstractions of `length` steps in `mdp`."""
    if family == "expert":
        expert = policy_iteration(option_model(mdp, primitive_options(mdp)))[0]
        return option_model(mdp, expert_routines(mdp, expert, length))
    return option_model(mdp, action_repeats(mdp, length))


def sweep(family: str, seed: int, seeds: int) -> Sweep:
    """All lengths of `seeds` random problems."""
    models, primitive = [], []
    for index in range(seeds):
        mdp = problem(family, np.random.default_rng([seed, 4, FAMILIES.index(family), index]))
        models += [abstractions(family, mdp, length) for length in LENGTHS]
        primitive += [optimal_values(option_model(mdp, primitive_options(mdp)))] * len(LENGTHS)
    stacked = OptionModel(np.stack([m.reward for m in models]), np.stack([m.kernel for m in models]))
    best, reference = optimal_values(stacked), np.stack(primitive)
    return Sweep(
        models=stacked,
        best=best,
        gbar=np.array([m.gbar for m in models]),
        largest_reward=np.array([m.largest_reward for m in models]),
        scale=reference.max(-1),
        pruning_error=(reference - best).max(-1) / reference.max(-1),
    )


def study(seed: int, seeds: int, done: Done = nothing) -> Study:
    """Every algorithm on every family with `seeds` problems of each. `UNITS` units."""
    families = {family: _family(sweep(family, seed, seeds), seed, done) for family in FAMILIES}
    numbers = {
        "lengths": list(LENGTHS),
        "discount": DISCOUNT,
        "seeds": seeds,
        "tolerances": list(TOLERANCES),
        "limit": LIMIT,
        "families": families,
    }
    verdicts = [_bound_verdict(families), _monotone_verdict(families)]
    verdicts += [_speed_verdict(name, family, families) for family in FAMILIES for name in ALGORITHMS]
    return Study("Longer abstractions, fewer iterations?", numbers, verdicts)


def _family(problems: Sweep, seed: int, done: Done) -> dict[str, Any]:
    found: dict[str, Any] = {
        "one_over_one_minus_gbar": _by_length(1 / (1 - problems.gbar)).mean(0).tolist(),
        "pruning_error": _by_length(problems.pruning_error).mean(0).tolist(),
        "by_tolerance": {},
    }
    value_lists = value_iteration(problems.models, _longest(problems))
    policy_values = policy_iteration(problems.models)[1]
    done()
    ascents = _ascents(problems)
    for share in TOLERANCES:
        eps = problems.tolerance(share)
        counts = {
            "value_iteration": _first(np.stack([np.abs(v - problems.best).max(-1) for v in value_lists]), eps),
            "policy_iteration": _first(np.stack([(problems.best - v).max(-1) for v in policy_values]), eps),
        }
        tried = []
        for name, ascent in ascents:
            reached = iterations_to_reach(problems.models, problems.best, eps, ascent, LIMIT)
            counts[name] = reached
            if name.startswith("policy_gradient"):
                tried.append(reached)
            if share == TOLERANCES[-1]:
                done()
        counts["policy_gradient_best"] = np.min(tried, axis=0)
        bound = np.array([iteration_bound(*x) for x in zip(problems.gbar, problems.largest_reward, eps, strict=True)])
        found["by_tolerance"][str(share)] = _summary(counts, bound, seed)
    return found


def _ascents(problems: Sweep) -> list[tuple[str, Ascent]]:
    unit = 1 / problems.scale
    plain = [
        ("policy_gradient" if step == FIXED_STEP else f"policy_gradient_{step:g}", Ascent(step * unit))
        for step in PG_STEPS
    ]
    return [
        *plain,
        ("natural", Ascent(NATURAL_STEP * unit, natural=True)),
        ("natural_gamma", Ascent(NATURAL_STEP * unit, natural=True, growth=DISCOUNT)),
        ("natural_gbar", Ascent(NATURAL_STEP * unit, natural=True, growth=problems.gbar)),
    ]


def _summary(counts: dict[str, Array], bound: Array, seed: int) -> dict[str, Any]:
    """Counts, medians, slopes and speed-ups; a count that was not reached is null."""
    bounds = _by_length(bound)
    result: dict[str, Any] = {"bound": np.median(bounds, axis=0).tolist(), "bounds": bounds.tolist(), "algorithms": {}}
    for name, flat in counts.items():
        table = _by_length(flat)
        whole = np.isfinite(table).all()
        entry: dict[str, Any] = {
            "iterations": [[None if np.isinf(n) else int(n) for n in row] for row in table],
            "median": [None if np.isinf(n) else float(n) for n in np.median(table, axis=0)],
            "unreached": int(np.isinf(table).sum()),
        }
        if whole:
            slopes = np.array([_log_slope(b, n) for b, n in zip(bounds, table, strict=True)])
            rng = np.random.default_rng([seed, 4, 99])
            entry["slope"] = bootstrap(lambda drawn: float(drawn[0].mean()), [slopes], rng).json()
            entry["speed_up"] = float(np.median(np.maximum(table[:, 0], 1) / np.maximum(table[:, -1], 1)))
        result["algorithms"][name] = entry
    result["bound_speed_up"] = float(np.median(bounds[:, 0] / bounds[:, -1]))
    return result


def _log_slope(bound: Array, iterations: Array) -> float:
    """Slope of log N on log(bound) over the lengths; N = 0 counts as 1."""
    return slope(np.log(bound), np.log(np.maximum(iterations, 1)))


def _first(errors: Array, eps: Array) -> Array:
    """The first iteration whose error, [N, B], is at most eps, [B]; inf if none is."""
    inside = errors <= eps
    return np.where(inside.any(0), inside.argmax(0), np.inf)


def _longest(problems: Sweep) -> int:
    """Iterations that the bound says are enough for all."""
    eps = problems.tolerance(TOLERANCES[-1])
    return int(np.ceil(max(map(iteration_bound, problems.gbar, problems.largest_reward, eps)))) + 1


def _by_length(flat: Array) -> Array:
    """[B] -> [seeds, lengths]."""
    return flat.reshape(-1, len(LENGTHS))


def _bound_verdict(families: dict[str, Any]) -> Verdict:
    ratios = []
    for family in families.values():
        for result in family["by_tolerance"].values():
            for name in ("value_iteration", "policy_iteration"):
                iterations = np.array(result["algorithms"][name]["iterations"], dtype=np.float64)
                ratios.append(float((iterations / np.ceil(result["bounds"])).max()))
    evidence = f"N / bound is at most {max(ratios):.2f}"
    return verdict("value and policy iteration never need more than the bound", max(ratios) <= 1, evidence)


def _monotone_verdict(families: dict[str, Any]) -> Verdict:
    falls, pairs = {}, 0
    for family, found in families.items():
        iterations = np.array(
            [result["algorithms"]["value_iteration"]["iterations"] for result in found["by_tolerance"].values()]
        )
        steps = np.diff(iterations, axis=-1)
        falls[family] = float((steps <= 0).mean())
        pairs += steps.size
    evidence = "; ".join(f"{family}: {100 * share:.0f}%" for family, share in falls.items())
    claim = "each doubling of the length leaves value iteration with no more iterations"
    return verdict(claim, min(falls.values()) == 1, f"true of {evidence} of the doublings ({pairs} in all)")


def _speed_verdict(name: str, family: str, families: dict[str, Any]) -> Verdict:
    result = families[family]["by_tolerance"][str(TOLERANCES[0])]
    entry = result["algorithms"][name]
    claim = f"{family}: {ALGORITHMS[name]} gains from length as the bound does"
    if "slope" not in entry:
        return Verdict(
            claim,
            "undecided",
            f"{entry['unreached']} runs did not end in {LIMIT} updates",
            Cell(ALGORITHMS[name], family, "not reached"),
        )
    measured = Estimate(**entry["slope"])
    outcome: Outcome = "confirmed" if measured.low >= SAME else "refuted" if measured.high < SAME else "undecided"
    evidence = f"slope {measured}; {entry['speed_up']:.1f}x fewer from tau 1 to {LENGTHS[-1]}"
    cell = Cell(ALGORITHMS[name], family, str(measured))
    return Verdict(claim, outcome, f"{evidence}, the bound {result['bound_speed_up']:.1f}x", cell)
