"""The regimes, and the bandit that learned selection is compared with."""

from __future__ import annotations

import numpy as np
import pytest
import stage_regimes
import torch
from bench_stage_selection import Judged, online_rows, rows_of
from stage_study import LinUCB, every_regime, small_cnn

from rlnas_fast.placement.supernet import OutcomeTable

CASES = [(regime, level) for regime, levels in stage_regimes.SEVERITIES.items() for level in levels]


@pytest.mark.parametrize(("regime", "level"), CASES)
def test_every_image_is_spoilt_by_itself_and_seeded(regime: str, level: float) -> None:
    x = torch.randn(4, 3, 32, 32)

    def spoilt(images: torch.Tensor) -> torch.Tensor:
        return stage_regimes.spoil(images, regime, level, torch.Generator().manual_seed(3))

    before = x.clone()
    found = spoilt(x)
    assert torch.equal(x, before)
    assert found.shape == x.shape
    assert torch.equal(found, spoilt(x))
    assert torch.equal(found, x) == (regime == "clean")
    blank = spoilt(torch.cat([torch.zeros(1, 3, 32, 32), x[1:]]))
    torch.testing.assert_close(blank[1:], found[1:])


def test_patches_change_places_and_nothing_else() -> None:
    x = torch.randn(3, 3, 32, 32)
    found = stage_regimes.spoil(x, "patch shuffle", 8, torch.Generator().manual_seed(0))
    for image, shuffled in zip(x, found, strict=True):
        patches = {
            tuple(p.flatten().tolist())
            for p in image.unfold(1, 8, 8).unfold(2, 8, 8).permute(1, 2, 0, 3, 4).flatten(0, 1)
        }
        again = {
            tuple(p.flatten().tolist())
            for p in shuffled.unfold(1, 8, 8).unfold(2, 8, 8).permute(1, 2, 0, 3, 4).flatten(0, 1)
        }
        assert patches == again


def test_a_square_of_the_stated_side_is_covered() -> None:
    found = stage_regimes.spoil(torch.ones(5, 3, 32, 32), "occlusion", 14, torch.Generator().manual_seed(0))
    assert ((found == 0).sum(dim=(1, 2, 3)) == 3 * 14 * 14).all()


def test_a_blur_keeps_the_mean_and_takes_the_noise() -> None:
    x = 5 + torch.randn(2, 3, 32, 32)
    found = stage_regimes.spoil(x, "blur", 1.5, torch.Generator())
    torch.testing.assert_close(found.mean(), x.mean(), atol=0.05, rtol=0)
    assert float(found.std()) < 0.4 * float(x.std())
    torch.testing.assert_close(
        stage_regimes.spoil(torch.ones(1, 3, 32, 32), "blur", 2.0, torch.Generator()),
        torch.ones(1, 3, 32, 32),
    )


def test_a_training_batch_has_every_regime() -> None:
    x = torch.randn(50, 3, 32, 32)
    found = every_regime(x, torch.Generator().manual_seed(0))
    assert torch.equal(found[:10], x[:10])
    assert not (found[10:] == x[10:]).all(dim=(1, 2, 3)).any()


def test_the_network_is_small_enough() -> None:
    network = small_cnn()
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert sum(parameter.numel() for parameter in network.parameters()) < 80_000


def test_the_bandit_learns_what_is_linear() -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(400, 3, generator=generator)
    bandit = LinUCB(states, 2, seed=0)
    for state in states:
        action = bandit.select(state)
        bandit.update(state, action, float(state[1]) if action else -float(state[1]))
    right = [bandit.select(state, explore=False) == int(state[1] > 0) for state in states]
    assert sum(right) > 390


def judged(oracle: float) -> Judged:
    """A seed of 8 samples in which stage 1 has 0.5 everywhere and stage 2 ``oracle`` in one regime."""
    outcomes = torch.full((10, 4), 0.4)
    outcomes[:, 1] = 0.5
    outcomes[:2, 2] = oracle
    table = OutcomeTable(torch.zeros(10, 3), outcomes, torch.arange(10) // 2)
    picked = torch.tensor([2, 2, 1, 1, 1, 1, 1, 1, 1, 1])
    best = 100 * float(table.of(picked).mean())
    accuracy = dict.fromkeys(("dqn", "q-table", "reinforce", "ppo", "oracle"), best)
    accuracy |= dict.fromkeys(("linear", "shuffled", "best fixed", "random"), 50.0) | {"fixed 1": 50.0}
    accuracy["best of each batch"] = best
    return Judged(table, accuracy, picked)


def test_all_bounds_hold_where_the_agent_finds_what_there_is() -> None:
    rows = rows_of([judged(0.6), judged(0.7)])
    assert all(row.holds() for row in rows)
    assert rows[0].measured == pytest.approx(3)
    assert rows[1].measured == pytest.approx(100)
    assert "no headroom" not in rows[0].detail


def test_says_that_there_is_no_headroom_and_does_not_pass() -> None:
    rows = rows_of([judged(0.51), judged(0.51)])
    assert not rows[0].holds()
    assert "no headroom" in rows[0].detail
    assert not any(row.holds() for row in rows_of([judged(0.4), judged(0.4)])[:2])


def test_the_online_rows_are_of_every_training_and_tell_the_first_ones_apart() -> None:
    def runs(first: float, second: float) -> np.ndarray:  # two seeds, two trainings; each ended with stage 3
        return np.array([[[first, 1, 3], [second, 0, 3]]] * 2)

    found = {f"fixed:{name}": runs(90, 90) for name in ("none", "stage1", "stage2")}
    found |= {"fixed:stage3": runs(91, 91), "q-table": runs(89, 90.9)}
    best, none, collapsed = online_rows("digits", found)
    assert best.name == "digits: q-table - best fixed (stage3)"
    assert best.measured == pytest.approx(-1.05)
    assert (best.must, none.must) == (-0.5, -0.2)
    assert not best.holds()
    assert none.measured == pytest.approx(-0.05)
    assert none.holds()
    assert "the first training of each -1.00: seeds -1.00 -1.00" in none.detail
    assert "of 4 trainings" in none.detail
    assert (collapsed.measured, collapsed.unit) == (2.0, "of 4")
    assert collapsed.detail == "ended with none 0, stage1 0, stage2 0, stage3 4"
