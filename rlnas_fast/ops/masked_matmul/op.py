"""``y = x (W o M)^T + b`` with a mask that may change at every call.

Dispatch contract for CUDA tensors.  ``triton_kernels`` and ``cuda`` in this folder each expose

- ``unavailable_reason() -> str | None``: ``None`` where the kernels can run, else one line (why, and the remedy);
- ``forward(x, weight, mask, bias, int8_activations=False) -> y``: x [B, K] (stride 1 in its last dimension, any row
  stride), weight [N, K] contiguous, same dtype (float32 | bfloat16 | float16); bias [N] or None; y [B, N] contiguous;
- ``grad_input(grad_y, weight, mask) -> grad_x`` [B, K]: int8 tiles act through ``scale * payload``;
- ``grad_weight(grad_y, x, mask) -> grad_w`` [N, K], dense layout, exactly 0 off the mask (a sampled dense-dense
  product; int8 tiles are straight-through: treated like keep tiles);
- ``update_lists(mask) -> None``: fills counts, lists and stats from ``state`` and ``bits``, in place, no host sync;
- ``pack_mask(dense, mask) -> None``: bool [N, K] to ``bits`` and ``state`` in place (a tile without kept weights
  becomes prune, a pruned tile with kept weights becomes keep, int8 tiles with kept weights stay int8), then
  ``update_lists``; one memory-bound pass, no host sync.

``mask`` is a ``TileTensors``.  B, N or K may be 0 and lists may be empty: the result is zeros plus bias.  Inputs were
checked before the call.  A backend lacking one of these functions simply does not define it, and the other is asked.
"""
