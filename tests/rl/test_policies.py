"""The recurrent policy: what it samples is valid, and what it scores is what it sampled."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rlnas_fast.rl.policies import RecurrentPolicy, entropy, masked_log_softmax

SIZES = (3, 2, 4, 2)


def mask(prefix: tuple[int, ...]) -> np.ndarray:
    """Choice 0 of decision 2 is never valid; elsewhere all are."""
    valid = np.ones(SIZES[len(prefix)], dtype=bool)
    if len(prefix) == 2:
        valid[0] = False
    return valid


def is_complete(prefix: tuple[int, ...]) -> bool:
    """Choice 1 at decision 1 ends the sequence early."""
    return len(prefix) == len(SIZES) or (len(prefix) == 2 and prefix[1] == 1)


def make(seed: int = 0, **options: object) -> RecurrentPolicy:
    return RecurrentPolicy(
        SIZES,
        hidden=8,
        generator=torch.Generator().manual_seed(seed),
        **options,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("options", [{}, {"cell": "gru"}, {"tanh_constant": 1.5, "temperature": 2.0}])
def test_sampled_sequences_are_complete_and_valid(options: dict[str, object]) -> None:
    sequences, masks = make(**options).sample(200, mask, is_complete, torch.Generator().manual_seed(1))
    for row, sequence in enumerate(sequences):
        assert is_complete(sequence)
        for step, choice in enumerate(sequence):
            assert not is_complete(sequence[:step])
            assert mask(sequence[:step])[choice]
            assert masks[row, step].tolist()[: SIZES[step]] == mask(sequence[:step]).tolist()
    assert {len(sequence) for sequence in sequences} == {2, 4}


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_frequencies_match_the_scored_probabilities(cell: str) -> None:
    policy = make(cell=cell)
    with torch.no_grad():
        policy.head_bias.copy_(
            torch.randn(policy.head_bias.shape, generator=torch.Generator().manual_seed(5))
        )
    draws = 20_000
    sequences, _ = policy.sample(draws, mask, is_complete, torch.Generator().manual_seed(2))
    distinct = sorted(set(sequences))
    scored = policy(policy.episodes(distinct, mask))
    probabilities = scored.log_probs.sum(dim=1).exp().tolist()
    assert sum(probabilities) == pytest.approx(1.0, abs=1e-5)  # every sequence was drawn at least once
    for sequence, probability in zip(distinct, probabilities, strict=True):
        error = math.sqrt(probability * (1 - probability) / draws)
        assert sequences.count(sequence) / draws == pytest.approx(probability, abs=5 * error)


def test_masks_known_from_sampling_are_those_of_the_space() -> None:
    policy = make()
    sequences, masks = policy.sample(20, mask, is_complete, torch.Generator().manual_seed(3))
    fresh = policy.episodes(sequences, mask)
    known = policy.episodes(sequences, mask, dict(zip(sequences, masks, strict=True)))
    for name in ("choices", "masks", "lengths"):
        assert torch.equal(getattr(fresh, name), getattr(known, name))


def test_padding_counts_for_nothing() -> None:
    policy = make(value_head=True)
    long, short = (0, 0, 2, 1), (2, 1)
    together = policy(policy.episodes([long, short], mask))
    alone = policy(policy.episodes([short], mask))
    assert together.log_probs[1, 2:].tolist() == [0.0, 0.0]
    assert together.entropies[1, 2:].tolist() == [0.0, 0.0]
    assert together.values[1, 2:].tolist() == [0.0, 0.0]
    torch.testing.assert_close(together.log_probs[1, :2], alone.log_probs[0])
    torch.testing.assert_close(together.values[1, :2], alone.values[0])


def test_epsilon_one_and_infinite_flattening_draw_uniformly() -> None:
    policy = make()
    with torch.no_grad():
        policy.head_bias[:, 1] = 8.0
    draws = 4_000
    for options in ({"epsilon": 1.0}, {"flatten": 1e9}):
        sequences, _ = policy.sample(draws, mask, is_complete, torch.Generator().manual_seed(4), **options)
        first = np.bincount([sequence[0] for sequence in sequences], minlength=3) / draws
        assert first == pytest.approx(np.full(3, 1 / 3), abs=5 * math.sqrt(2 / 9 / draws))


def test_tanh_constant_bounds_how_sure_the_policy_can_be() -> None:
    policy = make(tanh_constant=1.0)
    with torch.no_grad():
        policy.head_bias[0, 0] = 1e6
    scored = policy(policy.episodes([(0, 1)], mask))
    # logits 1 and two within +- tanh(0.8) of 0 at this initialisation: far from the certainty of 1e6
    assert scored.log_probs[0, 0].exp().item() < 0.8


def test_masked_log_softmax_by_hand() -> None:
    logits = torch.tensor([0.0, 5.0, math.log(3.0)], requires_grad=True)
    log_probs = masked_log_softmax(logits, torch.tensor([True, False, True]))
    torch.testing.assert_close(log_probs.exp(), torch.tensor([0.25, 0.0, 0.75]))
    uncertainty = entropy(log_probs)
    torch.testing.assert_close(uncertainty, torch.tensor(0.25 * math.log(4) + 0.75 * math.log(4 / 3)))
    uncertainty.backward()
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[1] == 0.0


def test_entropy_of_the_uniform_distribution_is_the_logarithm_of_its_size() -> None:
    torch.testing.assert_close(entropy(torch.full((5,), math.log(1 / 5))), torch.tensor(math.log(5)))
