"""Whose turn a training step is."""

from collections import Counter

import pytest
from tu_diffuse.training.turns import expert_at, expert_of_step, steps_for_all

OWNED = [
    {"low": (0, 500), "high": (500, 1000)},
    {"refiner": (0, 200), "base": (200, 1000)},
    {"a": (0, 30), "b": (30, 31), "c": (31, 700), "d": (700, 1000)},
]


@pytest.mark.parametrize("owned", OWNED)
def test_turns_are_in_proportion_to_the_timesteps_at_any_moment(owned: dict[str, tuple[int, int]]):
    turns: Counter[str] = Counter()
    for step in range(20_000):
        turns[expert_of_step(owned, step)] += 1
        for name, (first, end) in owned.items():
            assert abs(turns[name] - (step + 1) * (end - first) / 1000) < 3


@pytest.mark.parametrize("owned", OWNED)
def test_the_steps_until_all_had_a_turn(owned: dict[str, tuple[int, int]]):
    steps = steps_for_all(owned)
    assert {expert_of_step(owned, step) for step in range(steps)} == set(owned)
    assert {expert_of_step(owned, step) for step in range(steps - 1)} != set(owned)


def test_the_owner_of_a_timestep():
    owned = OWNED[2]
    assert "".join(expert_at(owned, t) for t in (0, 29, 30, 31, 699, 700, 999)) == "aabccdd"
