"""Autoregressive policies: a recurrent network that makes one categorical decision after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ConfigError

Choices = tuple[int, ...]
Condition = Callable[[Choices], tuple[float, float]]  # prefix -> (target, cost so far), both about 1


@dataclass(frozen=True)
class Episodes:
    """A batch of finished choice sequences, padded to the longest.  B sequences, T decisions, C choices.

    Attributes:
        choices: int64 [B, T]; 0 where a sequence has ended.
        masks: bool [B, T, C], what was valid; choice 0 alone where a sequence has ended.
        lengths: int64 [B].
        conditions: float [B, T, 2], what the policy was told before each decision; None for nothing.
    """

    choices: Tensor
    masks: Tensor
    lengths: Tensor
    conditions: Tensor | None = None

    @property
    def present(self) -> Tensor:
        """Float [B, T]: 1 for decisions that were made, 0 for padding."""
        return (torch.arange(self.choices.shape[1]) < self.lengths[:, None]).float()


@dataclass(frozen=True)
class Scored:
    """What a policy says of a batch of sequences.

    Attributes:
        log_probs: float [B, T], of the decisions made; 0 for padding.
        entropies: float [B, T], of each decision's distribution in nats; 0 for padding.
        values: float [B, T], the value head's estimate before each decision, or None.
        log_all: float [B, T, C], the whole distributions.
    """

    log_probs: Tensor
    entropies: Tensor
    values: Tensor | None
    log_all: Tensor


class RecurrentPolicy(nn.Module):
    """LSTM or GRU that reads the previous choice and answers with logits for the next decision.

    Each decision has its own embedding and its own output weights, so positions need no encoding.  All
    start near zero: a fresh policy is close to uniform over what is valid.

    Source: Zoph and Le, Neural Architecture Search with Reinforcement Learning (2017), section 3.2;
    temperature and tanh constant as in Bello et al., Neural Optimizer Search (2017):
    logits = tanh_constant x tanh(logits / temperature).

    Args:
        sizes: how many choices each decision has, [T].
        hidden: width of the recurrent state and of the embeddings.
        cell: "lstm" or "gru".
        temperature: divides the logits; above 1 flattens.
        tanh_constant: bounds the logits to +- this; None leaves them free.
        value_head: adds an estimate of the final reward before each decision.
        generator: draws the initial weights; those of the condition start at 0, so that a policy that is
            told nothing is the same as one that cannot be.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        hidden: int = 64,
        cell: str = "lstm",
        temperature: float = 1.0,
        tanh_constant: float | None = None,
        value_head: bool = False,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        if cell not in ("lstm", "gru"):
            raise ConfigError(f"controller cell {cell!r}: choose 'lstm' or 'gru'")
        if hidden < 1 or temperature <= 0 or (tanh_constant is not None and tanh_constant <= 0):
            raise ConfigError(
                f"controller hidden={hidden}, temperature={temperature}, tanh_constant={tanh_constant}: "
                "all must be above 0"
            )
        self.sizes = tuple(sizes)
        self.temperature = temperature
        self.tanh_constant = tanh_constant
        steps, widest = len(self.sizes), max(self.sizes)
        self.embedding = nn.Embedding(1 + steps * widest, hidden)
        recurrent = nn.LSTM if cell == "lstm" else nn.GRU
        self.recurrent = recurrent(hidden, hidden, batch_first=True)
        self.head_weight = nn.Parameter(torch.empty(steps, widest, hidden))
        self.head_bias = nn.Parameter(torch.empty(steps, widest))
        self.value_head = nn.Linear(hidden, 1) if value_head else None
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.uniform_(-0.1, 0.1, generator=generator)
            self.head_bias.zero_()
        self.condition_weight = nn.Parameter(torch.zeros(2, hidden))

    def forward(self, episodes: Episodes) -> Scored:
        """Scores sequences in one pass, the choices that were made being fed back (teacher forcing)."""
        steps = episodes.choices.shape[1]
        previous = self._tokens(episodes.choices)[:, : steps - 1]
        tokens = torch.cat([torch.zeros_like(episodes.choices[:, :1]), previous], dim=1)
        told = episodes.conditions
        if told is None:  # the weight stays in the graph: whoever asks for every gradient gets it
            told = torch.zeros(*tokens.shape, 2)
        inputs = self.embedding(tokens) + told @ self.condition_weight
        hidden, _ = self.recurrent(inputs)
        logits = torch.einsum("bth,tch->btc", hidden, self.head_weight[:steps]) + self.head_bias[:steps]
        log_all = self._log_softmax(logits, episodes.masks, 1.0)
        present = episodes.present
        chosen = log_all.gather(2, episodes.choices[:, :, None]).squeeze(2)
        values = None if self.value_head is None else self.value_head(hidden).squeeze(2) * present
        return Scored(chosen * present, entropy(log_all) * present, values, log_all)

    @torch.no_grad()
    def sample(
        self,
        count: int,
        mask: Callable[[Choices], np.ndarray],
        is_complete: Callable[[Choices], bool],
        generator: torch.Generator,
        *,
        flatten: float = 1.0,
        epsilon: float = 0.0,
        condition: Condition | None = None,
    ) -> tuple[list[Choices], Tensor]:
        """Draws ``count`` complete sequences, all at once.

        Args:
            mask: which choices may follow a prefix, bool [choices of that decision].
            is_complete: whether a prefix is a whole sequence.
            flatten: divides the final logits, beside the policy's own temperature; large is uniform.
            epsilon: probability with which a decision is drawn uniformly among its valid choices.
            condition: what to tell the policy before each decision.
        Returns:
            The sequences, and what was valid at each of their decisions: bool [count, T, C].
        """
        steps, widest = self.head_bias.shape
        valid = np.zeros((count, steps, widest), dtype=bool)
        valid[:, :, 0] = True
        sequences: list[Choices] = [()] * count
        alive = [not is_complete(()) for _ in range(count)]
        tokens = torch.zeros(count, 1, dtype=torch.int64)
        state = None
        for step in range(steps):
            if not any(alive):
                break
            for row in range(count):
                if alive[row]:
                    allowed = mask(sequences[row])
                    valid[row, step, : len(allowed)] = allowed
            inputs = self.embedding(tokens)
            if condition is not None:
                told = torch.tensor([condition(sequence) for sequence in sequences])
                inputs = inputs + (told @ self.condition_weight)[:, None]
            hidden, state = self.recurrent(inputs, state)
            logits = torch.addmm(self.head_bias[step], hidden[:, 0], self.head_weight[step].T)
            allowed_now = torch.from_numpy(valid[:, step])
            log_probs = self._log_softmax(logits, allowed_now, flatten)
            if epsilon:
                uniform = self._log_softmax(torch.zeros_like(logits), allowed_now, 1.0)
                explore = torch.rand(count, 1, generator=generator) < epsilon
                log_probs = torch.where(explore, uniform, log_probs)
            noise = torch.empty_like(log_probs).exponential_(generator=generator).log_()
            drawn = (log_probs - noise).argmax(dim=1)  # the Gumbel-max trick
            tokens = (1 + step * widest + drawn)[:, None]
            for row, choice in enumerate(drawn.tolist()):
                if alive[row]:
                    sequences[row] += (choice,)
                    alive[row] = not is_complete(sequences[row])
        return sequences, torch.from_numpy(valid)

    def episodes(
        self,
        sequences: Sequence[Choices],
        mask: Callable[[Choices], np.ndarray],
        known: dict[Choices, Tensor] | None = None,
        conditions: Sequence[Condition | None] = (),
    ) -> Episodes:
        """Packs finished sequences for ``forward``.

        Args:
            known: masks [T, C] of sequences for which ``sample`` has already worked them out.
            conditions: of each sequence, or nothing at all.
        """
        steps, widest = self.head_bias.shape
        choices = np.zeros((len(sequences), steps), dtype=np.int64)
        masks = np.zeros((len(sequences), steps, widest), dtype=bool)
        masks[:, :, 0] = True
        for row, sequence in enumerate(sequences):
            choices[row, : len(sequence)] = sequence
            if known is not None and sequence in known:
                masks[row] = known[sequence].numpy()
                continue
            for step in range(len(sequence)):
                allowed = mask(sequence[:step])
                masks[row, step, : len(allowed)] = allowed
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        longest = max(1, int(lengths.max()))
        told = None
        if any(condition is not None for condition in conditions):
            told = torch.zeros(len(sequences), longest, 2)
            for row, (sequence, condition) in enumerate(zip(sequences, conditions, strict=True)):
                if condition is not None:
                    steps_told = [condition(sequence[:step]) for step in range(len(sequence))]
                    told[row, : len(sequence)] = torch.tensor(steps_told).reshape(-1, 2)
        return Episodes(
            torch.from_numpy(choices[:, :longest]), torch.from_numpy(masks[:, :longest]), lengths, told
        )

    def _tokens(self, choices: Tensor) -> Tensor:
        widest = self.head_bias.shape[1]
        return 1 + widest * torch.arange(choices.shape[1]) + choices

    def _log_softmax(self, logits: Tensor, masks: Tensor, flatten: float) -> Tensor:
        logits = logits / self.temperature
        if self.tanh_constant is not None:
            logits = self.tanh_constant * torch.tanh(logits)
        return masked_log_softmax(logits / flatten, masks)


def masked_log_softmax(logits: Tensor, masks: Tensor) -> Tensor:
    """Log-probabilities over what is valid; the lowest finite number for the rest, never -inf or NaN.

    Args:
        logits: float [..., C].
        masks: bool [..., C], at least one True in each row.
    """
    lowest = torch.finfo(logits.dtype).min
    return torch.log_softmax(logits.masked_fill(~masks, lowest), dim=-1).masked_fill(~masks, lowest)


def entropy(log_probs: Tensor) -> Tensor:
    """Entropy in nats of distributions given by their logarithms: float [..., C] -> [...]."""
    return -(log_probs.exp() * log_probs).sum(dim=-1)
