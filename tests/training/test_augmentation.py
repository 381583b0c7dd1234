"""Random changes to images."""

from __future__ import annotations

import pytest
import torch

from rlnas_fast.training.augmentation import AUGMENTATIONS, cutout, flip, shift

X = torch.arange(1, 64 * 2 * 16 * 8 + 1, dtype=torch.float32).reshape(64, 2, 16, 8)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_shape_stays_and_the_seed_decides(name: str) -> None:
    changed = AUGMENTATIONS[name](X, generator())
    assert changed.shape == X.shape
    assert torch.equal(changed, AUGMENTATIONS[name](X, generator()))
    assert not torch.equal(changed, X)


def test_flip_mirrors_some_images_whole() -> None:
    changed = flip(X, generator())
    mirrored = [torch.equal(new, old.flip(2)) for new, old in zip(changed, X, strict=True)]
    kept = [torch.equal(new, old) for new, old in zip(changed, X, strict=True)]
    assert all(a != b for a, b in zip(mirrored, kept, strict=True))
    assert 16 < sum(mirrored) < 48


def test_shift_moves_an_image_by_up_to_an_eighth_and_fills_with_0() -> None:
    changed = shift(X, generator())
    seen = set()
    for new, old in zip(changed, X, strict=True):
        inside = new[0] > 0
        rows, columns = int(inside.any(1).sum()), int(inside.any(0).sum())
        kept = new[:, inside.any(1)][:, :, inside.any(0)]
        down, right = 16 - rows, 8 - columns
        found = [
            (i, j)
            for i in (-down, down)
            for j in (-right, right)
            if torch.equal(kept, old[:, max(0, i) : 16 + min(0, i), max(0, j) : 8 + min(0, j)])
        ]
        assert found
        seen.add((rows, columns))
    assert {rows for rows, _ in seen} == {14, 15, 16}
    assert {columns for _, columns in seen} == {7, 8}


def test_cutout_blanks_one_rectangle_in_all_channels() -> None:
    blank = cutout(X, generator()) == 0
    assert torch.equal(blank[:, 0], blank[:, 1])
    assert torch.equal(blank[:, 0], blank[:, 0].any(1, keepdim=True) & blank[:, 0].any(2, keepdim=True))
    assert blank[:, 0].sum((1, 2)).max() == 5 * 3
    assert blank.any()
