"""Masked sparse matmul on a CPU: fastest peer / ours.

Every figure is against the fastest of the peers that can do the case, timed in the same rounds on inputs that
change. In a static case neither weight nor mask changes, so nobody's conversion is counted (ours: ``pack``);
in a dynamic case the mask changes before every call, and everybody's is (ours: the mask's update, the choice
of kernel and the packing; theirs start from the new mask in dense form).
"""

from __future__ import annotations

import functools
import itertools
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from harness import Row, geometric_mean, interleaved, main, ratio
from torch import nn

from rlnas_fast.ops.masked_matmul import INT8, TileMask, effective_weight, masked_matmul, pack
from rlnas_fast.ops.masked_matmul import cpu as kernels

Call = Callable[[], object]
SHAPES = ((512, 512), (1024, 1024), (2048, 2048), (3072, 768))
ZEROS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
TILES = (16, 32, 64)
GRID = "grid"  # how the names of its rows begin


class Inputs:
    """A few inputs in turn, so that no timing finds its input in a cache by luck."""

    def __init__(self, batch: int, features: int) -> None:
        self._cycle = itertools.cycle([torch.randn(batch, features) for _ in range(3)])

    def __call__(self) -> torch.Tensor:
        return next(self._cycle)


class Masks:
    """A mask that changes before every product, in the form each needs; all are of one density and kind."""

    def __init__(self, mask: TileMask, tile: int | None) -> None:
        def turns(matrix: torch.Tensor) -> list[torch.Tensor]:
            return [matrix, matrix.flip(0), matrix.flip(1)]

        self._live = TileMask(mask.shape, mask.tile, unstructured=tile is None)
        self._changes = itertools.cycle(
            [{"dense": dense} for dense in turns(mask.dense())]
            if tile is None
            else [{"state": state} for state in turns(mask.state)]
        )
        self._dense = itertools.cycle(turns(mask.dense()))

    def tiles(self) -> TileMask:
        """The mask after its next change, which costs an update."""
        self._live.update(**next(self._changes))
        return self._live

    def dense(self) -> torch.Tensor:
        """The next mask in dense form, for free."""
        return next(self._dense)


def scipy_product(weight: torch.Tensor) -> Callable[[torch.Tensor], object]:
    import scipy.sparse

    matrix = scipy.sparse.csr_matrix(weight.numpy())
    return lambda x: matrix @ x.numpy().T


def row_gather(
    weight: torch.Tensor, mask: torch.Tensor, tile_rows: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    """For each row of tiles a dense product with the columns of its live tiles."""
    columns = [row.nonzero().flatten() for row in mask[::tile_rows]]
    parts = [weight[i * tile_rows : (i + 1) * tile_rows, c].contiguous() for i, c in enumerate(columns)]

    def product(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.index_select(1, c) @ part.t() for c, part in zip(columns, parts, strict=True)], 1)

    return product


def onednn(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    packed = weight.to_mkldnn()
    return lambda x: F.linear(x.to_mkldnn(), packed).to_dense()


def static_peers(weight: torch.Tensor, mask: TileMask, x: Inputs, tile: int | None) -> dict[str, Call]:
    """Products with a weight that was masked and converted before the clock started."""
    applied = effective_weight(weight, mask.tensors)
    prepacked = onednn(applied)
    peers: dict[str, Call] = {
        "linear": lambda: F.linear(x(), applied),
        "onednn": lambda: prepacked(x()),
    }
    if mask.density() <= 0.5:
        csr, scipy_csr = applied.to_sparse_csr(), scipy_product(applied)
        peers["csr @ x.T"] = lambda: csr @ x().t()
        peers["scipy"] = lambda: scipy_csr(x())
        if mask.density() <= 0.1:
            peers["linear(x, csr)"] = lambda: F.linear(x(), csr)
        if tile:
            bsr, gather = applied.to_sparse_bsr((tile, tile)), row_gather(applied, mask.dense(), tile)
            peers["bsr @ x.T"] = lambda: bsr @ x().t()
            peers["row gather"] = lambda: gather(x())
    return peers


def dynamic_peers(
    weight: torch.Tensor, density: float, masks: Masks, x: Inputs, tile: int | None
) -> dict[str, Call]:
    """Products that start from a dense weight and a mask."""
    peers: dict[str, Call] = {
        "linear(x, W*M)": lambda: F.linear(x(), weight * masks.dense()),
        "onednn": lambda: onednn(weight * masks.dense())(x()),
    }
    if density <= 0.1:
        peers["csr @ x.T"] = lambda: (weight * masks.dense()).to_sparse_csr() @ x().t()
        peers["scipy"] = lambda: scipy_product(weight * masks.dense())(x())
    if tile and density <= 0.5:
        peers["row gather"] = lambda: row_gather(weight, masks.dense(), tile)(x())
        peers["bsr @ x.T"] = lambda: (weight * masks.dense()).to_sparse_bsr((tile, tile)) @ x().t()
    return peers


def close_peers(peers: dict[str, Call]) -> dict[str, Call]:
    """Leaves out peers over three times slower than the fastest (best of two runs): time for the rest."""
    best = {name: min(seconds) for name, seconds in interleaved(peers, repeats=2, warmup=1).items()}
    return {name: call for name, call in peers.items() if best[name] <= 3 * min(best.values())}


def random_mask(rows: int, cols: int, zeros: float, tile: int | None) -> TileMask:
    if tile is None:
        return TileMask.from_scores(torch.rand(rows, cols), 1 - zeros)
    return TileMask.from_scores(torch.rand(rows, cols), 1 - zeros, (tile, tile), whole_tiles=True)


def timed(functions: dict[str, Call], quick: bool, seconds: float = 1.2) -> dict[str, list[float]]:
    return interleaved(
        functions, repeats=5 if quick else 15, warmup=1 if quick else 2, seconds=seconds / (3 if quick else 1)
    )


def forward_rows(quick: bool) -> list[Row]:
    rows = []
    size = 2048
    weight = torch.randn(size, size) / 45
    for zeros, batch, must, aim in ((0.2, 512, 1.0, None), (0.4, 64, 1.0, None), (0.1, 512, None, 1.0)):
        mask, x = random_mask(size, size, zeros, 32), Inputs(batch, size)
        applied = effective_weight(weight, mask.tensors)
        prepacked = onednn(applied)
        figure, detail = ratio(
            timed(
                {
                    "ours": lambda: kernels.forward(x(), weight, mask.tensors, None, kernel="tiles"),  # noqa: B023
                    "linear": lambda: F.linear(x(), applied),  # noqa: B023
                    "onednn": lambda: prepacked(x()),  # noqa: B023
                },
                quick,
            ),
            "ours",
        )
        name = f"32x32, {zeros:.0%} zeros, B={batch}, packed every call"
        rows.append(Row(name, figure, must, aim, detail=detail))
    for tile, batch, must, aim in ((32, 512, 2.5, 3.0), (None, 512, 2.0, 2.7), (None, 64, 2.0, 2.7)):
        mask, x = random_mask(size, size, 0.9, tile), Inputs(batch, size)
        packed = pack(weight, mask, batch=batch)
        ours = {"ours": lambda: masked_matmul(x(), weight, mask, packed=packed)}  # noqa: B023
        kind = f"{tile}x{tile}" if tile else "unstructured"
        figure, detail = ratio(timed(ours | static_peers(weight, mask, x, tile), quick, 2.5), "ours")
        rows.append(Row(f"{kind}, 90 %, B={batch}, forward, static", figure, must, aim, detail=detail))
        masks = Masks(mask, tile)
        ours = {"ours": lambda: masked_matmul(x(), weight, masks.tiles())}  # noqa: B023
        peers = dynamic_peers(weight, mask.density(), masks, x, tile)
        figure, detail = ratio(timed(ours | peers, quick, 2.5), "ours")
        rows.append(Row(f"{kind}, 90 %, B={batch}, forward, dynamic", figure, must, aim, detail=detail))
    return rows


def backward_rows(quick: bool) -> list[Row]:
    rows = []
    size, batch = 2048, 512
    for tile, must, aim in ((32, 2.5, 3.5), (None, 1.8, 2.5)):
        mask, x = random_mask(size, size, 0.9, tile), Inputs(batch, size)
        weight = (torch.randn(size, size) / 45).requires_grad_()
        grad = torch.randn(batch, size)
        dense = mask.dense()
        applied = weight.detach() * dense
        csr, csr_t = applied.to_sparse_csr(), applied.t().to_sparse_csr()

        def ours(weight=weight, mask=mask, x=x, grad=grad) -> None:
            inputs = x().detach().requires_grad_(), weight
            torch.autograd.grad(masked_matmul(inputs[0], inputs[1], mask), inputs, grad)

        def masked_dense(weight=weight, dense=dense, x=x, grad=grad) -> None:
            inputs = x().detach().requires_grad_(), weight
            torch.autograd.grad(F.linear(inputs[0], inputs[1] * dense), inputs, grad)

        def sparse(csr=csr, csr_t=csr_t, x=x, grad=grad) -> None:
            now = x()
            _ = csr @ now.t(), csr_t @ grad.t()
            torch.sparse.sampled_addmm(csr, grad.t(), now, beta=0.0)

        calls: dict[str, Call] = {"ours": ours, "linear(x, W*M)": masked_dense, "csr, sampled_addmm": sparse}
        if tile:
            calls["row gather, sampled_addmm"] = _gathered_step(weight.detach(), mask, csr, x, grad)
        kind = f"{tile}x{tile}" if tile else "unstructured"
        figure, detail = ratio(timed(calls, quick, 3), "ours")
        rows.append(Row(f"{kind}, 90 %, B={batch}, forward + backward", figure, must, aim, detail=detail))
        must, aim = (3.0, 3.6) if tile else (1.8, 2.2)
        figure, detail = ratio(
            timed(
                {
                    "ours": lambda: kernels.grad_weight(grad, x(), mask.tensors),  # noqa: B023
                    "sampled_addmm": lambda: torch.sparse.sampled_addmm(csr, grad.t(), x(), beta=0.0),  # noqa: B023
                    "dense": lambda: (grad.t() @ x()).mul_(dense),  # noqa: B023
                },
                quick,
                2,
            ),
            "ours",
        )
        rows.append(Row(f"{kind}, 90 %, B={batch}, sampled product", figure, must, aim, detail=detail))
    return rows


def _gathered_step(
    weight: torch.Tensor, mask: TileMask, csr: torch.Tensor, x: Inputs, grad: torch.Tensor
) -> Call:
    forward = row_gather(weight, mask.dense(), mask.tile[0])
    backward = row_gather(weight.t().contiguous(), mask.dense().t().contiguous(), mask.tile[1])

    def step() -> None:
        now = x()
        forward(now), backward(grad)
        torch.sparse.sampled_addmm(csr, grad.t(), now, beta=0.0)

    return step


def int8_rows(quick: bool) -> list[Row]:
    size, batch = 2048, 512
    weight, x = torch.randn(size, size) / 45, Inputs(batch, size)
    full = TileMask((size, size))
    mask = TileMask((size, size), int8=True)
    mask.update(state=torch.full_like(mask.state, INT8))
    mask.quantise(weight)
    integers = torch.randint(-127, 128, (size, size), dtype=torch.int8)
    quantised = torch.randint(-127, 128, (batch, size), dtype=torch.int8)
    times = timed(
        {
            "int8 activations": lambda: masked_matmul(x(), weight, mask, int8_activations=True),
            "int8 weights": lambda: kernels.forward(x(), weight, mask.tensors, None, kernel="tiles"),
            "keep": lambda: kernels.forward(x(), weight, full.tensors, None, kernel="tiles"),
            "auto": lambda: masked_matmul(x(), weight, full),
            "linear": lambda: F.linear(x(), weight),
            "_int_mm": lambda: torch._int_mm(quantised, integers.t()),
        },
        quick,
        3,
    )
    sample = x()
    truth = sample.double() @ effective_weight(weight, mask.tensors).double().t()
    approximate = masked_matmul(sample, weight, mask, int8_activations=True)
    error = float((approximate - truth).norm() / truth.norm())
    figures = [
        ("all int8, activations quantised, B=512", "int8 activations", ["linear"], 2.8, 3.5),
        ("all int8, exact in x, against all keep, B=512", "int8 weights", ["keep"], 0.95, 1.2),
        ("0 % zeros against linear, B=512", "auto", ["linear"], 0.95, 1.1),
    ]
    rows = []
    for name, ours, peers, must, aim in figures:
        figure, detail = ratio(times, ours, peers)
        rows.append(Row(name, figure, must, aim, detail=detail))
    rows.append(Row("relative error of int8 activations", error, 1.2e-2, unit="", at_most=True))
    return rows


def update_rows(quick: bool) -> list[Row]:
    size, batch = 2048, 512
    weight, x = torch.randn(size, size) / 45, Inputs(batch, size)
    rows = []
    for tile in (32, None):
        mask = random_mask(size, size, 0.8, tile)
        target = TileMask((size, size), unstructured=tile is None)
        dense, state = mask.dense(), mask.state.clone()
        change = {"dense": dense} if tile is None else {"state": state}
        times = timed(
            {
                "update": lambda: target.update(**change),  # noqa: B023
                "forward": lambda: masked_matmul(x(), weight, mask),  # noqa: B023
            },
            quick,
        )
        update, forward = (statistics.median(times[name]) for name in ("update", "forward"))
        kind = "tiles" if tile else "unstructured"
        rows.append(
            Row(
                f"mask update, {kind}, share of a B=512 forward at 80 %",
                100 * update / forward,
                10,
                4,
                "%",
                at_most=True,
                detail=f"{update * 1e3:.3g} of {forward * 1e3:.3g} ms",
            )
        )
    return rows


def training_rows(quick: bool) -> list[Row]:
    sizes, batch = (768, 2048, 2048, 512), 256
    weights = [nn.Parameter(torch.randn(o, i) / i**0.5) for i, o in itertools.pairwise(sizes)]
    x, target = Inputs(batch, sizes[0]), torch.randn(batch, sizes[-1])
    masks = [[random_mask(o, i, 0.9, 32) for i, o in itertools.pairwise(sizes)] for _ in range(3)]
    states = itertools.cycle([[mask.state.clone() for mask in step] for step in masks])
    denses = itertools.cycle([[mask.dense() for mask in step] for step in masks])
    live = masks[0]
    optimiser = torch.optim.SGD(weights, lr=1e-3)

    def step(product: Callable[[torch.Tensor, int], torch.Tensor]) -> None:
        hidden = x()
        for layer in range(3):
            hidden = product(hidden, layer)
            hidden = hidden.relu() if layer < 2 else hidden
        optimiser.zero_grad()
        F.mse_loss(hidden, target).backward()
        optimiser.step()

    def ours() -> None:
        for mask, state in zip(live, next(states), strict=True):
            mask.update(state=state)
        step(lambda hidden, layer: masked_matmul(hidden, weights[layer], live[layer]))

    def dense() -> None:
        now = next(denses)
        step(lambda hidden, layer: F.linear(hidden, weights[layer] * now[layer]))

    figure, detail = ratio(timed({"ours": ours, "linear(x, W*M)": dense}, quick, 2.5), "ours")
    return [Row("training step, 3-layer MLP, tiles 90 %, new masks", figure, 2.0, detail=detail)]


def grid_rows(shape: tuple[int, int], quick: bool) -> Iterator[Row]:
    """Every case of one shape of the grid, in both tables."""
    weight = torch.randn(*shape) / shape[1] ** 0.5
    for zeros, tile in itertools.product(ZEROS[::3] if quick else ZEROS, (None, *TILES)):
        mask = random_mask(*shape, zeros, tile)
        masks = Masks(mask, tile)
        kind = f"{tile}x{tile}" if tile else "unstructured"
        for batch, table in itertools.product((1, 64, 512), ("static", "dynamic")):
            x = Inputs(batch, shape[1])
            if table == "static":
                packed = pack(weight, mask, batch=batch)
                chosen, peers = packed.kernel, static_peers(weight, mask, x, tile)
                peers.pop("linear(x, csr)", None)  # five times slower than the other spelling everywhere
                ours: Call = lambda: masked_matmul(x(), weight, mask, packed=packed)  # noqa: B023, E731
            else:
                chosen = kernels.choose("forward", batch, mask.tensors, weight.dtype)
                peers = dynamic_peers(weight, mask.density(), masks, x, tile)
                ours = lambda: masked_matmul(x(), weight, masks.tiles())  # noqa: B023, E731
            times = interleaved({"ours": ours} | close_peers(peers), repeats=31, warmup=1, seconds=0.15)
            figure, detail = ratio(times, "ours")
            name = f"{GRID} {shape[0]}x{shape[1]} {table}: {kind} {zeros:.0%} B={batch}"
            yield Row(name, figure, 0.9, detail=f"{chosen}: {detail}")


def condense(rows: list[Row]) -> list[Row]:
    """The worst and the mean case of each table of the grid; other rows stay as they are."""
    kept = [row for row in rows if not row.name.startswith(GRID)]
    cases = [row for row in rows if row.name.startswith(GRID)]
    for table, group in itertools.groupby(
        sorted(cases, key=lambda row: row.name.split(":")[0]), key=lambda row: row.name.split(":")[0]
    ):
        ordered = sorted(group, key=lambda row: row.measured)
        slow = "; ".join(
            f"{row.measured:.2f} {row.name.partition(': ')[2]} ({row.detail})"
            for row in ordered
            if not row.holds()
        )
        name = f"{table}, {len(ordered)} cases"
        kept.append(Row(f"{name}, worst", ordered[0].measured, 0.9, detail=slow or ordered[0].name))
        kept.append(Row(f"{name}, mean", geometric_mean([row.measured for row in ordered])))
    return kept


def without_gradients(rows: Callable[[bool], Iterable[Row]]) -> Callable[[bool], Iterable[Row]]:
    def measure(quick: bool) -> Iterator[Row]:
        with torch.no_grad():
            yield from prepared(rows)(quick)

    return measure


def prepared(rows: Callable[[bool], Iterable[Row]]) -> Callable[[bool], Iterable[Row]]:
    def measure(quick: bool) -> Iterator[Row]:
        warnings.filterwarnings("ignore", message="Sparse (CSR|BSR)")
        torch.manual_seed(0)
        torch.set_num_threads(2)
        yield from rows(quick)

    return measure


PARTS = {
    "forward": without_gradients(forward_rows),
    "backward": prepared(backward_rows),
    "int8": without_gradients(int8_rows),
    "update": without_gradients(update_rows),
    "training": prepared(training_rows),
    **{f"grid-{n}x{k}": without_gradients(functools.partial(grid_rows, (n, k))) for n, k in SHAPES},
}


if __name__ == "__main__":
    main(__doc__, PARTS, condense=condense)
