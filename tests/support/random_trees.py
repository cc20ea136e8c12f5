"""Random trajectories and actions with every way to share: made for the tests of packing."""

from __future__ import annotations

import random

import numpy as np

from swirl_fast.comb.tree import SampledState, Trunk


def random_trunks(seed: int, vocab: int = 3, longest: int = 14, most: int = 40) -> list[Trunk]:
    """At most `most` actions on one to four trunks, of paths up to 2 * longest + 5 tokens.

    Few different tokens at the front make the trunks a tree; an action is new, the copy of a sibling or one that leaves it late, what
    the trunk goes on with or one that leaves that late, a single token, or empty. So states lie inside other states' teeth, teeth
    inside trunks, and sequences come twice.
    """
    draw = random.Random(seed)

    def some(n: int) -> list[int]:
        return [draw.randrange(1, vocab) for _ in range(n)]

    root = some(draw.randint(1, longest))
    branches: list[Trunk] = []
    number = 0
    for _ in range(draw.randint(1, 4)):
        if branches and draw.random() < 0.2:
            trunk = branches[0].tokens.tolist()
        else:
            kept = root[: draw.randint(0, len(root))]
            trunk = [*kept, *some(draw.randint(0 if kept else 1, longest))]
        states = []
        for length in sorted({draw.randint(1, len(trunk)) for _ in range(draw.randint(1, 3))}):
            actions: list[list[int]] = []
            for _ in range(draw.randint(0, 4)):
                kind = draw.choice(["new", "new", "sibling", "late", "recorded", "recorded late", "one", "empty"])
                action = some(draw.randint(1, 5))
                if kind == "sibling" and actions:
                    action = list(draw.choice(actions))
                elif kind == "late" and actions:
                    action = [*draw.choice(actions)[:3], *some(2)]
                elif kind.startswith("recorded"):
                    action = trunk[length : length + draw.randint(1, 5)] + (some(1) if kind == "recorded late" else [])
                elif kind == "one":
                    action = some(1)
                elif kind == "empty":
                    action = []
                if number + len(actions) < most:
                    actions.append(action)
            arrays = tuple(np.array(action, np.int32) for action in actions)
            states.append(SampledState(length, arrays, tuple(range(number, number + len(arrays)))))
            number += len(arrays)
        branches.append(Trunk(np.array(trunk, np.int32), tuple(states)))
    return branches
