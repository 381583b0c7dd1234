"""The C++ kernels: what they are given, and which of them runs."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from rlnas_fast.errors import ConfigError, KernelUnavailable
from rlnas_fast.ops import native
from rlnas_fast.ops.masked_matmul import cost_model
from rlnas_fast.ops.masked_matmul.reference import effective_weight
from rlnas_fast.ops.masked_matmul.tile_mask import TileMask, TileTensors, unpack_bits

__all__ = [
    "KERNELS",
    "Packed",
    "choose",
    "forward",
    "forward_packed",
    "grad_input",
    "grad_weight",
    "gradients",
    "pack",
    "pack_fastest",
    "pack_mask",
    "takes",
    "unavailable_reason",
    "update_lists",
]

KERNELS = ("dense", "tiles", "rows", "direct")
KEEP_ONLY, BOTH = 0, 2
DIRECT_ROWS = 8  # the most rows of x that the kernel without packing takes
_ONE_THREAD_PRODUCTS = 1 << 17  # some ten microseconds of work; the kernels for few rows take longer for each
_ONE_THREAD_PRODUCTS_FEW = 1 << 14
_ONE_THREAD_WEIGHTS = 1 << 15
# A second core first fetches its rows of x from the core that wrote them. Where they share no cache that took
# 67 ns a line, more than is saved in products this small with this few weights for a feature.
_ONE_CORE_PRODUCTS, _ONE_CORE_WEIGHTS = 1 << 21, 32
_ONE_CORE_ELEMENTS = 1 << 17  # of x and y: more are worth the memory bandwidth of all cores
_WORTH_A_TRIAL = 3.0  # times the least estimate
_ALWAYS_TRIED = 1e-4  # seconds: estimates of so little are rough
_TRIALS, _TRIAL_SECONDS = 20, 0.03
_DOUBT = 1.1  # by how much a kernel must beat the dense product in a trial
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def unavailable_reason() -> str | None:
    """Returns why the C++ kernels cannot run, or None when they can."""
    try:
        native.cpu()
    except KernelUnavailable as error:
        return str(error)
    return None


def choose(product: cost_model.Product, batch: int, mask: TileTensors, dtype: torch.dtype) -> str:
    """Names the kernel that the cost model of this CPU expects to be fastest."""
    return cost_model.fastest(product, batch, mask, dtype)


class Packed(NamedTuple):
    """A masked weight in the form that one kernel reads; holds no reference to weight or mask."""

    kernel: str
    shape: tuple[int, int]  # (N, K)
    mask: TileTensors  # as the kernel reads it
    weight: torch.Tensor  # [N, K]
    buffers: tuple[torch.Tensor, ...]
    nonzeros: int
    product: Callable[..., None] | None = None  # the compiled kernel with weight and mask; None: dense


def pack(weight: torch.Tensor, mask: TileTensors, kernel: str) -> Packed:
    """Brings a masked weight into a kernel's form; later changes of weight or mask do not reach it.

    Args:
        weight: [N, K], contiguous.
        mask: its mask.
        kernel: one of ``KERNELS``.
    """
    weight = weight.detach().contiguous()
    frozen = mask.map(torch.Tensor.clone)
    nonzeros = int(mask.stats[2])
    if kernel == "dense":
        dense = _masked(weight, mask)
        prepacked = dense.dtype == torch.float32 and dense.numel() and torch.backends.mkldnn.is_available()
        return Packed(kernel, mask.shape, frozen, dense, (dense.to_mkldnn(),) if prepacked else (), nonzeros)
    buffers: tuple[torch.Tensor, ...] = ()
    narrow = weight
    if kernel == "direct":
        narrow = weight = _masked(weight, mask)
    else:
        narrow, frozen = _without_dead_columns(weight, frozen)
    if kernel == "tiles":
        buffers = (torch.empty(_tile_floats(frozen, False), dtype=torch.float32),)
        threads = torch.get_num_threads()
        _kernels().pack_tiles(_weight(narrow, frozen), False, BOTH, buffers[0].data_ptr(), threads)
    elif kernel == "rows":
        buffers = _pack_rows(narrow, frozen, False, fresh=True)
    product = _kernels().PackedProduct(
        *(kernel, _weight(narrow, frozen), tuple(map(_address, buffers)) if kernel == "rows" else (0, 0, 0)),
        *(_address(buffers[0]) if kernel == "tiles" else 0, _address(frozen.input_permutation)),
        _address(frozen.output_permutation),
    )
    return Packed(kernel, mask.shape, frozen, weight, (*buffers, narrow), nonzeros, product)


def _without_dead_columns(weight: torch.Tensor, mask: TileTensors) -> tuple[torch.Tensor, TileTensors]:
    """The columns of weight and mask that lie in a live tile, where x is gathered anyway.

    Then what the permutation does not name is not gathered.  Without one, x is read in vectors, and gathering
    what is left would take longer.
    """
    order, width = mask.input_permutation, mask.tile[1]
    live = (mask.state != 0).any(0)
    if order is None or bool(live.all()) or not bool(live.any()):
        return weight, mask
    columns = live.repeat_interleave(width)[: mask.shape[1]]
    narrow = weight[:, columns].contiguous()
    made = TileMask(
        narrow.shape,
        mask.tile,
        unstructured=mask.bits is not None,
        int8=mask.payload is not None,
        output_permutation=mask.output_permutation,
    )
    kept = None if mask.bits is None else unpack_bits(mask.bits, mask.shape[1])[:, columns]
    made.update(state=mask.state[:, live], dense=kept)
    tensors = made.tensors._replace(input_permutation=order[columns].contiguous())
    if mask.payload is not None and mask.scale is not None:
        tensors = tensors._replace(
            payload=mask.payload[:, columns].contiguous(), scale=mask.scale[:, live].contiguous()
        )
    return narrow, tensors


def pack_fastest(weight: torch.Tensor, mask: TileTensors, batch: int) -> Packed:
    """Packs a weight for every kernel that may be the fastest, times them, and keeps one."""
    seconds = cost_model.estimates("forward_packed", batch, mask, weight.dtype)
    limit = max(_WORTH_A_TRIAL * min(seconds.values()), _ALWAYS_TRIED)
    hopeful = [kernel for kernel, s in seconds.items() if s <= limit]
    packed = [pack(weight, mask, kernel) for kernel in hopeful]
    if len(packed) == 1:
        return packed[0]
    x = weight.new_ones(batch, mask.shape[1])
    times: list[list[float]] = [[] for _ in packed]
    start = time.perf_counter()
    for trial in range(_TRIALS):
        for one, seconds_of_one in zip(packed, times, strict=True):
            begin = time.perf_counter()
            forward_packed(x, one, None)
            seconds_of_one.append(time.perf_counter() - begin)
        if trial and time.perf_counter() - start > _TRIAL_SECONDS:
            break
    # Here the weight is as near as a cache can hold it, which flatters all kernels but the dense product.
    medians = [
        statistics.median(took) * (1 if one.kernel == "dense" else _DOUBT)
        for one, took in zip(packed, times, strict=True)
    ]
    return packed[medians.index(min(medians))]


def takes(packed: Packed, x: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Says whether ``forward_packed`` can be called as it is; quick, since products take microseconds."""
    rows, cols = packed.shape
    return (
        x.dtype is packed.weight.dtype
        and x.dim() == 2
        and x.shape[1] == cols
        and x.is_cpu
        and not (x.requires_grad and torch.is_grad_enabled())
        and (packed.kernel != "direct" or x.shape[0] <= DIRECT_ROWS)
        and not x.is_neg()
        and (
            bias is None
            or (bias.dtype is x.dtype and bias.is_cpu and bias.shape == (rows,) and not bias.is_neg())
        )
        and not torch.is_autocast_enabled("cpu")
    )


def forward_packed(x: torch.Tensor, packed: Packed, bias: torch.Tensor | None) -> torch.Tensor:
    """Computes the product with a packed weight; x [B, K], y [B, N]."""
    batch = x.shape[0]
    if packed.product is None:
        # oneDNN's own packing does not pay for a few rows
        weight = packed.buffers[0] if packed.buffers and batch > DIRECT_ROWS else packed.weight
        return _dense(x, weight, packed.mask, bias)
    x, bias = _rows_adjacent(x), None if bias is None else bias.contiguous()
    y = x.new_empty(batch, packed.shape[0])
    packed.product(
        *(x.data_ptr(), batch, x.stride(0), y.data_ptr(), _address(bias)),
        _threads(batch, packed.nonzeros, packed.shape),
    )
    return y


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    mask: TileTensors,
    bias: torch.Tensor | None,
    int8_activations: bool = False,
    kernel: str = "auto",
) -> torch.Tensor:
    """Computes ``y = x (W o M)^T + b``: x [B, K], y [B, N]."""
    x, weight = _rows_adjacent(x), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    if int8_activations and mask.payload is not None and int(mask.stats[1]):
        return _forward_int8(x, weight, mask, bias)
    if kernel == "auto":
        kernel = choose("forward", x.shape[0], mask, x.dtype)
    if kernel == "dense":
        return _dense(x, _dense_weight(weight, mask), mask, bias)
    y = x.new_empty(x.shape[0], mask.shape[0])
    if kernel == "tiles":
        _multiply_tiles(x, _weight(weight, mask), mask, False, BOTH, y, bias)
    elif kernel == "rows":
        _multiply_rows(x, mask, False, _pack_rows(weight, mask, False), y, bias)
    else:
        _multiply_direct(x, _weight(weight, mask), mask, y, bias)
    return y


def grad_input(
    grad_y: torch.Tensor, weight: torch.Tensor, mask: TileTensors, kernel: str = "auto"
) -> torch.Tensor:
    """Computes ``gx = gy (W o M)``: gy [B, N], gx [B, K]."""
    grad_y, weight = _rows_adjacent(grad_y), weight.contiguous()
    if kernel in ("auto", "direct"):
        kernel = choose("grad_input", grad_y.shape[0], mask, grad_y.dtype)
    if kernel == "dense":
        if mask.output_permutation is not None:
            grad_y = grad_y[:, mask.output_permutation.long()]
        return _scattered(grad_y @ _dense_weight(weight, mask), mask.input_permutation)
    grad_x = grad_y.new_empty(grad_y.shape[0], mask.shape[1])
    if kernel == "tiles":
        _multiply_tiles(grad_y, _weight(weight, mask), mask, True, BOTH, grad_x, None)
    else:
        _multiply_rows(grad_y, mask, True, _pack_rows(weight, mask, True), grad_x, None)
    return grad_x


def grad_weight(
    grad_y: torch.Tensor, x: torch.Tensor, mask: TileTensors, kernel: str = "auto"
) -> torch.Tensor:
    """Computes ``gW = (gy^T x) o M``, exactly 0 off the mask: gy [B, N], x [B, K], gW [N, K]."""
    grad_y, x = _rows_adjacent(grad_y), _rows_adjacent(x)
    if kernel in ("auto", "direct"):
        kernel = choose("grad_weight", x.shape[0], mask, x.dtype)
    if kernel == "dense":
        if mask.output_permutation is not None:
            grad_y = grad_y[:, mask.output_permutation.long()]
        if mask.input_permutation is not None:
            x = x[:, mask.input_permutation.long()]
        return _apply(grad_y.t() @ x, mask)
    grad_w = x.new_empty(mask.shape)
    both = _matrix(grad_y), _matrix(x), _weight(grad_w, mask)
    to = (
        *(_address(mask.output_permutation), _address(mask.input_permutation)),
        *(grad_w.data_ptr(), torch.get_num_threads()),
    )
    if kernel == "tiles":
        _kernels().sample_tiles(*both, *to)
    else:
        _kernels().sample_rows(*both, _rows_form(_pack_rows(grad_w, mask, False, pattern_only=True)), *to)
    return grad_w


def gradients(
    grad_y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, mask: TileTensors, kernel: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes what ``grad_input`` and ``grad_weight`` do; over rows, gy and the weight are packed once."""
    grad_y, x, weight = _rows_adjacent(grad_y), _rows_adjacent(x), weight.contiguous()
    for_x = for_weight = kernel
    if kernel in ("auto", "direct"):
        for_x = choose("grad_input", grad_y.shape[0], mask, grad_y.dtype)
        for_weight = choose("grad_weight", grad_y.shape[0], mask, grad_y.dtype)
    if not for_x == for_weight == "rows":
        return grad_input(grad_y, weight, mask, for_x), grad_weight(grad_y, x, mask, for_weight)
    grad_x, grad_w = torch.empty_like(x), torch.empty_like(weight)
    rows = _rows_form(_pack_rows(weight, mask, False))
    columns = _rows_form(_rows_room("columns", mask.shape[1], mask))
    threads = torch.get_num_threads()
    _kernels().transpose_rows(rows, mask.shape, columns, threads)
    _kernels().backward_rows(
        *(_matrix(grad_y), _matrix(x), _weight(weight, mask), rows, columns),
        *(_address(mask.output_permutation), _output(grad_x, mask.input_permutation, None)),
        *(grad_w.data_ptr(), threads),
    )
    return grad_x, grad_w


def pack_mask(dense: torch.Tensor, mask: TileTensors) -> None:
    """Sets bits and state from a bool [N, K], in place, then the lists."""
    assert mask.bits is not None
    _kernels().pack_mask(
        *(dense.contiguous().data_ptr(), mask.shape, mask.tile, mask.bits.data_ptr(), mask.state.data_ptr()),
        torch.get_num_threads(),
    )
    update_lists(mask)


def update_lists(mask: TileTensors) -> None:
    """Derives counts, lists and stats from state and bits, in place."""
    _kernels().update_lists(
        *(mask.state.data_ptr(), _address(mask.bits), mask.shape, mask.tile, _lists(mask)),
        *(mask.stats.data_ptr(), torch.get_num_threads()),
    )


def _forward_int8(
    x: torch.Tensor, weight: torch.Tensor, mask: TileTensors, bias: torch.Tensor | None
) -> torch.Tensor:
    # In float32 throughout: integer sums are exact, and both parts are added before rounding to x's dtype.
    wide = x.float()
    wide_bias = None if bias is None else bias.float()
    y = wide.new_empty(x.shape[0], mask.shape[0])
    keep_tiles = int(mask.stats[0])
    if keep_tiles:
        _multiply_tiles(wide, _weight(weight, mask), mask, False, KEEP_ONLY, y, wide_bias)
    width, blocks = _blocks(mask.tile[0])
    depth = -(-mask.tile[1] // 4) * 4
    columns = int(mask.stats[1]) * blocks * width
    payload = _workspace("int8 weight", columns * depth, torch.int8)
    corrections = _workspace("corrections", columns, torch.int32)
    threads = torch.get_num_threads()
    _kernels().pack_int8(_weight(weight, mask), payload.data_ptr(), corrections.data_ptr(), threads)
    quantised = _workspace("int8 x", x.shape[0] * mask.state.shape[1] * depth, torch.uint8)
    row_scales = _workspace("row scales", x.shape[0])
    _kernels().multiply_int8(
        *(_matrix(wide), _weight(weight, mask), payload.data_ptr(), corrections.data_ptr()),
        *(_address(mask.input_permutation), _output(y, mask.output_permutation, wide_bias), keep_tiles > 0),
        *(quantised.data_ptr(), row_scales.data_ptr(), threads),
    )
    return y.to(x.dtype)


def _dense(
    x: torch.Tensor, weight: torch.Tensor, mask: TileTensors, bias: torch.Tensor | None
) -> torch.Tensor:
    if mask.input_permutation is not None:
        x = x[:, mask.input_permutation.long()]
    if weight.is_mkldnn:
        y = F.linear(x.contiguous().to_mkldnn(), weight).to_dense()
    elif mask.output_permutation is None:
        return F.linear(x, weight, bias)
    else:
        y = F.linear(x, weight)
    y = _scattered(y, mask.output_permutation)
    return y if bias is None else y.add_(bias)


def _dense_weight(weight: torch.Tensor, mask: TileTensors) -> torch.Tensor:
    _, int8, weights, _ = mask.stats.tolist()
    return weight if not int8 and weights == weight.numel() else _masked(weight, mask)


def _apply(weight: torch.Tensor, mask: TileTensors) -> torch.Tensor:
    if int(mask.stats[2]) == weight.numel():
        return weight
    return _masked(weight, mask._replace(payload=None, scale=None))


def _masked(weight: torch.Tensor, mask: TileTensors) -> torch.Tensor:
    """``effective_weight`` in one pass; weight [N, K], without gradients."""
    if weight.dtype not in _DTYPES:
        return effective_weight(weight, mask)
    weight = weight.contiguous()
    to = torch.empty_like(weight)
    threads = torch.get_num_threads() if weight.numel() > _ONE_THREAD_WEIGHTS else 1
    _kernels().mask_weight(_weight(weight, mask), to.data_ptr(), threads)
    return to


def _scattered(y: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    return y if order is None else torch.empty_like(y).index_copy_(1, order.long(), y)


def _multiply_tiles(
    x: torch.Tensor,
    weight: tuple[object, ...],
    mask: TileTensors,
    transposed: bool,
    kinds: int,
    y: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
    permutations = mask.input_permutation, mask.output_permutation
    read, written = permutations[::-1] if transposed else permutations
    _kernels().multiply_tiles(
        *(_matrix(x), weight, transposed, kinds, _address(read), _output(y, written, bias)),
        _threads(x.shape[0], mask.stats.tolist()[2], mask.shape),
    )


def _pack_rows(
    weight: torch.Tensor,
    mask: TileTensors,
    transposed: bool,
    *,
    fresh: bool = False,
    pattern_only: bool = False,
) -> tuple[torch.Tensor, ...]:
    rows = _rows_room("rows", mask.shape[transposed], mask, fresh=fresh, pattern_only=pattern_only)
    _kernels().pack_rows(_weight(weight, mask), transposed, _rows_form(rows), torch.get_num_threads())
    return rows


def _rows_room(
    name: str, out: int, mask: TileTensors, *, fresh: bool = False, pattern_only: bool = False
) -> tuple[torch.Tensor, ...]:
    """Room for a mask's weights as compressed rows: starts, indices, and values unless only the pattern."""
    if max(mask.shape) > 1 << 16:
        raise ConfigError(
            f"backend 'rows' takes at most 65536 features (16-bit indices), got {list(mask.shape)}"
        )
    count = mask.stats.tolist()[2] + 32  # written in whole vectors
    parts = [
        ("start", out + 1, torch.int32),
        ("indices", count, torch.int16),
        ("values", count, torch.float32),
    ]
    return tuple(
        torch.empty(size, dtype=dtype) if fresh else _workspace(f"{part} of {name}", size, dtype)
        for part, size, dtype in parts[: 2 if pattern_only else 3]
    )


def _rows_form(rows: tuple[torch.Tensor, ...]) -> tuple[int, int, int]:
    start, indices, *values = rows
    return start.data_ptr(), indices.data_ptr(), values[0].data_ptr() if values else 0


def _multiply_rows(
    x: torch.Tensor,
    mask: TileTensors,
    transposed: bool,
    rows: tuple[torch.Tensor, ...],
    y: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
    permutations = mask.input_permutation, mask.output_permutation
    read, written = permutations[::-1] if transposed else permutations
    _kernels().multiply_rows(
        *(_matrix(x), y.shape[1], _rows_form(rows), _address(read), _output(y, written, bias)),
        _threads(x.shape[0], mask.stats.tolist()[2], mask.shape),
    )


def _multiply_direct(
    x: torch.Tensor,
    weight: tuple[object, ...],
    mask: TileTensors,
    y: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
    if x.shape[0] > DIRECT_ROWS:
        raise ConfigError(f"backend 'direct' takes at most {DIRECT_ROWS} rows of x, got {x.shape[0]}")
    _kernels().multiply_direct(
        *(_matrix(x), weight, _address(mask.input_permutation), _output(y, mask.output_permutation, bias)),
        _threads(x.shape[0], mask.stats.tolist()[2], mask.shape),
    )


def _threads(batch: int, nonzeros: int, shape: tuple[int, int]) -> int:
    """Returns one thread where waking the others and giving them their data costs more than they save."""
    products = batch * nonzeros
    if batch <= DIRECT_ROWS:
        few = products <= _ONE_THREAD_PRODUCTS_FEW
    else:
        few = products <= _ONE_THREAD_PRODUCTS or (
            products <= _ONE_CORE_PRODUCTS
            and nonzeros <= _ONE_CORE_WEIGHTS * sum(shape)
            and batch * sum(shape) <= _ONE_CORE_ELEMENTS
        )
    return 1 if few else torch.get_num_threads()


def _kernels():  # type: ignore[no-untyped-def]
    return native.cpu().masked_matmul


_local = threading.local()


def _workspace(name: str, size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Returns memory that this thread keeps for its next call: fresh pages cost more than some products."""
    rooms: dict[str, torch.Tensor] = _local.__dict__.setdefault("rooms", {})
    room = rooms.get(name)
    if room is None or room.numel() < size:
        room = rooms[name] = torch.empty(max(size, 1), dtype=dtype)
    return room


def _blocks(tile_out: int) -> tuple[int, int]:
    """Width and number of the packed blocks of a tile; mirrors block_width in csrc/cpu/masked_matmul.h."""
    width = 16 if tile_out <= 16 else 32
    return width, -(-tile_out // width)


def _tile_floats(mask: TileTensors, transposed: bool) -> int:
    out, inner = mask.tile[::-1] if transposed else mask.tile
    width, blocks = _blocks(out)
    live = int(mask.stats[0]) + int(mask.stats[1])
    return live * blocks * width * inner + 32


def _rows_adjacent(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _matrix(x: torch.Tensor) -> tuple[int, int, int, int, int]:
    return x.data_ptr(), _DTYPES[x.dtype], x.shape[0], x.shape[1], x.stride(0)


def _output(
    y: torch.Tensor, permutation: torch.Tensor | None, bias: torch.Tensor | None
) -> tuple[int, int, int, int]:
    return y.data_ptr(), _DTYPES[y.dtype], _address(permutation), _address(bias)


def _lists(mask: TileTensors) -> tuple[int, int, int, int]:
    return (
        mask.row_count.data_ptr(),
        mask.row_tiles.data_ptr(),
        mask.col_count.data_ptr(),
        mask.col_tiles.data_ptr(),
    )


def _weight(weight: torch.Tensor, mask: TileTensors) -> tuple[object, ...]:
    incomplete = mask.stats.tolist()[3]
    return (
        *(weight.data_ptr(), _DTYPES[weight.dtype], mask.shape, mask.tile, _lists(mask)),
        *(_address(mask.bits) if incomplete else 0, _address(mask.payload), _address(mask.scale)),
    )
