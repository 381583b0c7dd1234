"""A linear layer whose weight has a mask that may change at every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import nn

from rlnas_fast.errors import ShapeError
from rlnas_fast.ops.masked_matmul import Packed, TileMask, cpu, effective_weight, masked_matmul, pack, plan
from rlnas_fast.ops.masked_matmul.tile_mask import TileTensors, update_lists

__all__ = ["MaskedLinear", "MaskedWeight"]

_PERSISTENT = ("state", "bits", "payload", "scale", "input_permutation", "output_permutation")
_BUFFERS = tuple(f"mask_{name}" for name in TileTensors._fields[2:])
_WATCHED = tuple(f"mask_{name}" for name in _PERSISTENT)  # the others follow from these


class MaskedWeight(nn.Module):
    """A weight matrix, its bias and its ``TileMask``: what the masked layers share.

    The mask's tensors are buffers, so they move with the module and are in its state dict (lists that follow
    from them are not).  Change the mask through ``mask.update``: it writes the buffers in place.

    Args:
        weight: [N, K].
        mask: its mask, on the same device, whose tensors become the module's; or a bool tensor [N, K].
        bias: [N] or None.
    """

    def __init__(
        self, weight: torch.Tensor, mask: TileMask | torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        super().__init__()
        if isinstance(mask, torch.Tensor):
            mask = TileMask.from_dense(mask)
        if mask.shape != tuple(weight.shape):
            raise ShapeError(f"mask must be {list(weight.shape)} like the weight, got {list(mask.shape)}")
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.int8_activations = False
        self._tile = mask.tile
        for name in TileTensors._fields[2:]:
            self.register_buffer(f"mask_{name}", getattr(mask.tensors, name), persistent=name in _PERSISTENT)
        self._packed: dict[tuple[int, int], tuple[tuple[tuple[int, int], ...], Packed]] = {}

    @property
    def mask(self) -> TileMask:
        """The mask, as a view of the module's buffers."""
        buffers = self._buffers  # attributes of a module are looked up ten times as slowly
        rows, cols = self.weight.shape
        tensors: list[Any] = [buffers[name] for name in _BUFFERS]
        return TileMask.from_tensors(TileTensors((rows, cols), self._tile, *tensors))

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Computes ``x (W o M)^T + b``; in eval mode without gradients the weight is packed once and kept."""
        packed = self._pack(x.numel() // max(1, x.shape[-1])) if self._is_frozen(x) else None
        if packed is not None and cpu.takes(packed, x, bias):  # small products take as long as the way there
            return cpu.forward_packed(x, packed, bias)
        return masked_matmul(
            x, self.weight, self.mask, bias, int8_activations=self.int8_activations, packed=packed
        )

    def plan(self, batch: int) -> dict[str, Any]:
        """Says which kernel a product with ``batch`` rows would run and what it expects to save."""
        return plan(batch, self.mask, self.weight.dtype)

    def dense_weight(self) -> torch.Tensor:
        """Returns the [N, K] whose dense product is ours: masked, dequantised, permutations undone."""
        t = self.mask.tensors
        weight = effective_weight(self.weight.detach(), t)
        if t.input_permutation is not None:
            weight = torch.empty_like(weight).index_copy_(1, t.input_permutation.long(), weight)
        if t.output_permutation is not None:
            weight = torch.empty_like(weight).index_copy_(0, t.output_permutation.long(), weight)
        return weight.clone()

    def _take(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Copies a dense weight [N, K] and bias, gathered by the mask's permutations, into int8 tiles too."""
        t = self.mask.tensors
        with torch.no_grad():
            if t.output_permutation is not None:
                weight = weight[t.output_permutation.long()]
            if t.input_permutation is not None:
                weight = weight[:, t.input_permutation.long()]
            self.weight.copy_(weight)
            if self.bias is not None and bias is not None:
                self.bias.copy_(bias)
            if t.payload is not None:
                self.mask.quantise(self.weight)

    def _is_frozen(self, x: torch.Tensor) -> bool:
        """Says whether what is made from weight and mask may be kept for the next call."""
        frozen = not self.training and not torch.is_grad_enabled() and x.is_cpu
        plain = not torch.compiler.is_compiling() and not torch.is_autocast_enabled("cpu")
        return frozen and plain and not self.int8_activations

    def _versions(self) -> tuple[tuple[int, int], ...]:
        """Changes with every change of weight or mask."""
        buffers = self._buffers
        watched = [self.weight, *[tensor for n in _WATCHED if (tensor := buffers[n]) is not None]]
        return tuple([(tensor.data_ptr(), tensor._version) for tensor in watched])

    def _pack(self, batch: int) -> Packed:
        """The packed weight for batches of about this size, made again when weight or mask have changed.

        Which layout is fastest depends on the number of threads, too.
        """
        bits = max(1, batch).bit_length()
        size = (bits, torch.get_num_threads())
        versions = self._versions()
        known = self._packed.get(size)
        if known is None or known[0] != versions:
            largest = (1 << bits) - 1
            known = self._packed[size] = (versions, pack(self.weight, self.mask, batch=largest))
        return known[1]

    def train(self, mode: bool = True) -> Self:
        """Switches between training and evaluation; what was packed is forgotten when training begins.

        A fused optimiser changes a weight without raising its version, so ``_pack`` would not notice.
        """
        if mode:
            self._packed = {}
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_packed": {}}

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        scale = self.mask.tensors.scale  # stays float32 when the module's dtype changes
        super()._apply(fn, recurse)
        if scale is not None:
            self.mask_scale = scale.to(self.weight.device)
        self._packed = {}
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        update_lists(self.mask.tensors)


class MaskedLinear(MaskedWeight):
    """``y = x (W o M)^T + b``, as ``nn.Linear`` with most of the work left out.

    Args:
        in_features: K.
        out_features: N.
        mask: a ``TileMask`` of shape [N, K]; by default every tile of 32 x 32 kept.
        bias: adds a learned [N].
        device: where the parameters live.
        dtype: of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        mask: TileMask | torch.Tensor | None = None,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dense = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        mask = TileMask((out_features, in_features), device=device) if mask is None else mask
        super().__init__(dense.weight.detach(), mask, None if dense.bias is None else dense.bias.detach())

    @classmethod
    def from_dense(cls, linear: nn.Linear, mask: TileMask | torch.Tensor | None = None) -> MaskedLinear:
        """Makes the masked form of a trained layer; it computes the same where the mask keeps.

        The weight is copied.  With permutations in the mask it is gathered, so that with every weight kept
        the layer computes what it did before; int8 tiles are filled from the weight.
        """
        layer = cls(
            linear.in_features,
            linear.out_features,
            mask,
            bias=linear.bias is not None,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        layer._take(linear.weight, linear.bias)
        return layer

    def to_dense(self) -> nn.Linear:
        """Returns the ``nn.Linear`` that computes the same (up to rounding), zeros where the mask prunes."""
        rows, cols = self.weight.shape
        linear = nn.Linear(
            cols, rows, self.bias is not None, device=self.weight.device, dtype=self.weight.dtype
        )
        with torch.no_grad():
            linear.weight.copy_(self.dense_weight())
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps [..., K] to [..., N]."""
        return self.product(x, self.bias)

    def extra_repr(self) -> str:
        """Says sizes and tile."""
        rows, cols = self.weight.shape
        return f"in_features={cols}, out_features={rows}, bias={self.bias is not None}, tile={self._tile}"
