"""The search as Gymnasium environments.

Importing this registers them: ``import rlnas_fast.envs`` and ``gymnasium.make("rlnas_fast/ChainCNN-v0")``.
``gymnasium.make("rlnas_fast.envs:rlnas_fast/ChainCNN-v0")`` does both; Gymnasium 1.0 loads no plugins.
"""

from __future__ import annotations

import gymnasium

gymnasium.register("rlnas_fast/ChainCNN-v0", entry_point="rlnas_fast.environments:chain_cnn")
gymnasium.register("rlnas_fast/Architecture-v0", entry_point="rlnas_fast.environments:architecture")
