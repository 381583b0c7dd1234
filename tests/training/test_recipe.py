"""Settings of a recipe."""

from __future__ import annotations

from typing import Any

import pytest

from rlnas_fast.errors import ConfigError
from rlnas_fast.search import Budget
from rlnas_fast.training.recipe import Recipe


def test_shifts_images_that_are_seen_often_unless_told() -> None:
    assert Recipe().augmentations(Budget(9)) == ()
    assert Recipe().augmentations(Budget(10)) == ("shift",)
    assert Recipe(augment=()).augmentations(Budget(10)) == ()
    assert Recipe(augment=("flip",)).augmentations(Budget(1)) == ("flip",)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "adm"}, "unknown optimizer 'adm': did you mean 'adam'"),
        ({"augment": ("flop",)}, "unknown augmentation 'flop': did you mean 'flip'"),
        ({"dtype": "float16"}, "unknown dtype"),
        ({"learning_rate": 0.0}, "learning_rate = 0.0; give a number above 0"),
        ({"learning_rate": float("nan")}, "learning_rate = nan"),
        ({"learning_rate": float("inf")}, "learning_rate = inf"),
        ({"batch_size": 1}, "batch_size = 1"),
        ({"weight_decay": -1.0}, "weight_decay = -1.0"),
        ({"warmup": 1.0}, "warmup = 1.0"),
        ({"label_smoothing": 1.0}, "label_smoothing = 1.0"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe(**settings)
