"""The masked product against its reference: every kernel, instruction set, dtype, layout and gradient."""

from __future__ import annotations

import pytest
import torch
import torch.fx.experimental.proxy_tensor
import torch.nn.functional as F

from rlnas_fast.errors import ConfigError, KernelUnavailable, ShapeError
from rlnas_fast.ops.masked_matmul import (
    INT8,
    TileMask,
    cost_model,
    effective_weight,
    masked_matmul,
    masked_matmul_reference,
    pack,
    plan,
)
from rlnas_fast.ops.masked_matmul import cpu as kernels

KINDS = ("full", "tiles", "bits", "none", "int8")

pytestmark = pytest.mark.usefixtures("quick_cost_model")


def make_mask(kind: str, rows: int, cols: int, tile: tuple[int, int], *, permuted: bool = False) -> TileMask:
    mask = TileMask(
        (rows, cols),
        tile,
        unstructured=kind in ("bits", "int8"),
        int8=kind == "int8",
        input_permutation=torch.randperm(cols) if permuted else None,
        output_permutation=torch.randperm(rows) if permuted else None,
    )
    if kind == "tiles":
        mask.update(state=(torch.rand(mask.state.shape) < 0.5).to(torch.uint8))
    elif kind == "none":
        mask.update(state=torch.zeros_like(mask.state))
    elif kind == "bits":
        mask.update(dense=torch.rand(rows, cols) < 0.3)
    elif kind == "int8":
        mask.update(dense=torch.rand(rows, cols) < 0.6)
        mask.update(state=torch.randint(0, 3, mask.state.shape).to(torch.uint8))
    return mask


def error(values: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest deviation, relative to the largest value."""
    if not truth.numel():
        return 0.0
    return float((values.double() - truth).abs().max() / truth.abs().max().clamp_min(1e-30))


def check_all(kernel: str, mask: TileMask, batch: int, dtype: torch.dtype) -> None:
    """Outputs and gradients: at most twice the error of the dense product, plus one rounding."""
    rows, cols = mask.shape
    weight, bias = torch.randn(rows, cols).to(dtype), torch.randn(rows).to(dtype)
    x, grad = torch.randn(batch, cols).to(dtype), torch.randn(batch, rows).to(dtype)
    if mask.tensors.payload is not None:
        mask.quantise(weight)

    def run(backend: str, cast: torch.dtype) -> tuple[torch.Tensor, ...]:
        inputs = [tensor.to(cast, copy=True).requires_grad_() for tensor in (x, weight, bias)]
        if cast == torch.float64:
            t = mask.tensors
            t = t if t.scale is None else t._replace(scale=t.scale.double())
            y = masked_matmul_reference(inputs[0], inputs[1], t, inputs[2])
        else:
            y = masked_matmul(*inputs[:2], mask, inputs[2], backend=backend)
        return y.detach(), *torch.autograd.grad(y, inputs, grad.to(cast))

    truth, dense, ours = run("reference", torch.float64), run("reference", dtype), run(kernel, dtype)
    for name, t, d, o in zip(("y", "grad_x", "grad_w", "grad_b"), truth, dense, ours, strict=True):
        assert o.dtype == dtype
        assert o.shape == t.shape
        assert error(o, t) <= 2 * error(d, t) + torch.finfo(dtype).eps, name
    assert not ours[2][~mask.dense()].any()


def _poison() -> None:
    """Leaves NaN in the work memory of every kernel, as far as the tests' shapes reach."""
    weight, mask = torch.full((320, 1120), torch.nan), TileMask((320, 1120)).tensors
    x, grad = torch.full((160, 1120), torch.nan), torch.full((160, 320), torch.nan)
    for kernel in ("tiles", "rows"):
        for batch in (40, 160):
            kernels.forward(x[:batch], weight, mask, None, kernel=kernel)
            kernels.gradients(grad[:batch], x[:batch], weight, mask, kernel)
    kernels.forward(x[:8], weight, mask, None, kernel="direct")


@pytest.mark.parametrize("kernel", ["tiles", "rows", "direct"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kernel_on_every_instruction_set(isa, kernel, kind):
    shapes = [((32, 32), (64, 96)), ((7, 5), (50, 70)), ((16, 16), (33, 100)), ((64, 48), (130, 65))]
    for permuted in (False, True):
        for tile, (rows, cols) in shapes:
            _poison()
            mask = make_mask(kind, rows, cols, tile, permuted=permuted)
            batches = (1, 2, 3, 5, 8) if kernel == "direct" else (1, 13, 37)
            check_all(kernel, mask, batches[(rows + permuted) % len(batches)], torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", ["dense", "tiles", "rows", "direct"])
def test_sixteen_bit_dtypes(isa, kernel, dtype):
    for kind in ("tiles", "int8"):
        check_all(kernel, make_mask(kind, 45, 70, (16, 32), permuted=True), 6, dtype)


@pytest.mark.parametrize("kernel", ["tiles", "rows"])
@pytest.mark.parametrize("batch", [9, 16, 17, 64, 65, 200])
def test_every_height_of_panel(kernel, batch):
    check_all(kernel, make_mask("bits", 40, 300, (32, 32)), batch, torch.float32)


@pytest.mark.parametrize("kind", ["bits", "int8"])
def test_panels_larger_than_a_cache(kind):
    check_all("rows", make_mask(kind, 24, 2100, (16, 32)), 130, torch.float32)


@pytest.mark.parametrize("kernel", ["tiles", "rows"])
def test_long_sums_stay_accurate(kernel):
    mask = TileMask((32, 4096))
    weight, x = torch.rand(32, 4096), torch.rand(24, 4096)
    truth = x.double() @ weight.double().t()
    ours = error(masked_matmul(x, weight, mask, backend=kernel), truth)
    assert ours <= 2 * error(F.linear(x, weight), truth) + torch.finfo(torch.float32).eps


@pytest.mark.parametrize("kernel", ["auto", "dense", "tiles", "rows", "direct"])
def test_nothing_to_do_gives_zeros_plus_bias(kernel):
    bias = torch.randn(40)
    mask = make_mask("none", 40, 24, (16, 16))
    y = masked_matmul(torch.randn(5, 24), torch.randn(40, 24), mask, bias, backend=kernel)
    assert torch.equal(y, bias.expand(5, 40))
    y = masked_matmul(torch.randn(0, 24), torch.randn(40, 24), TileMask((40, 24)), bias, backend=kernel)
    assert y.shape == (0, 40)
    y = masked_matmul(torch.randn(3, 0), torch.randn(40, 0), TileMask((40, 0)), bias, backend=kernel)
    assert torch.equal(y, bias.expand(3, 40))
    assert masked_matmul(torch.randn(3, 4), torch.randn(0, 4), TileMask((0, 4)), backend=kernel).shape == (
        3,
        0,
    )


def test_empty_batches_have_zero_gradients():
    mask = make_mask("bits", 20, 24, (16, 16))
    for kernel in ("dense", "tiles", "rows"):
        weight = torch.randn(20, 24, requires_grad=True)
        masked_matmul(torch.randn(0, 24), weight, mask, backend=kernel).sum().backward()
        assert torch.equal(weight.grad, torch.zeros(20, 24))


@pytest.mark.parametrize("kernel", ["tiles", "rows", "dense", "direct"])
def test_layouts_of_x(kernel):
    mask = make_mask("bits", 20, 24, (8, 8))
    weight = torch.randn(20, 24)
    base = torch.randn(7, 60)
    for x in (
        base[:, 3:27],
        base[::2, 1:49:2],
        torch.randn(24, 6).t(),
        torch.randn(1, 24).expand(5, 24),
        torch.randn(2, 3, 24),
        torch.randn(24),
        torch.randn(24, 3, 2).permute(2, 1, 0),
    ):
        y = masked_matmul(x, weight.t().contiguous().t(), mask, backend=kernel)
        torch.testing.assert_close(y, F.linear(x, weight * mask.dense()))  # default float32 tolerances


def test_bool_masks_and_real_masks():
    x, weight = torch.randn(9, 24), torch.randn(20, 24, requires_grad=True)
    dense = torch.rand(20, 24) < 0.3
    torch.testing.assert_close(masked_matmul(x, weight, dense), F.linear(x, weight * dense))
    real = torch.rand(20, 24, requires_grad=True)
    grad = torch.randn(9, 20)
    masked_matmul(x, weight, real).backward(grad)
    torch.testing.assert_close(real.grad, (grad.t() @ x) * weight.detach())
    torch.testing.assert_close(weight.grad, (grad.t() @ x) * real.detach())


@pytest.mark.parametrize("kernel", ["dense", "tiles", "rows", "direct"])
def test_nan_and_infinity_reach_what_is_kept(kernel):
    mask = TileMask.from_dense(torch.eye(40, dtype=torch.bool), (8, 8))
    for value in (torch.nan, torch.inf):
        x = torch.ones(3, 40)
        x[1, 11] = value
        y = masked_matmul(x, torch.ones(40, 40), mask, backend=kernel)
        assert not torch.isfinite(y[1, 11])
        assert torch.equal(y[[0, 2]], torch.ones(2, 40))


def test_int8_activations_are_the_reference_arithmetic(isa):
    for tile in ((32, 32), (16, 24), (7, 5)):
        mask = make_mask("int8", 50, 70, tile, permuted=True)
        weight, bias = torch.randn(50, 70), torch.randn(50)
        mask.quantise(weight)
        x = torch.randn(29, 70) * torch.logspace(-3, 3, 29)[:, None]
        x[4] = 0
        truth = masked_matmul(x, weight, mask, bias, int8_activations=True, backend="reference")
        ours = masked_matmul(x, weight, mask, bias, int8_activations=True)
        # Integer sums are exact; what is left are the float32 sums over tiles.
        torch.testing.assert_close(ours, truth, rtol=2e-5, atol=2e-5 * float(truth.abs().max()))


def test_int8_activations_lose_at_most_what_is_stated():
    weight, x = torch.randn(512, 512) / 22, torch.randn(64, 512)
    mask = TileMask((512, 512), int8=True)
    mask.update(state=torch.full_like(mask.state, INT8))
    mask.quantise(weight)
    truth = x.double() @ effective_weight(weight, mask.tensors).double().t()
    ours = masked_matmul(x, weight, mask, int8_activations=True)
    assert float((ours - truth).norm() / truth.norm()) <= 1.2e-2


def test_int8_activations_with_nan_stay_nan():
    mask = TileMask((32, 32), int8=True)
    mask.update(state=torch.full_like(mask.state, INT8))
    mask.quantise(torch.randn(32, 32))
    x = torch.randn(3, 32)
    x[1, 5] = torch.nan
    y = masked_matmul(x, torch.randn(32, 32), mask, int8_activations=True)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("kernel", ["reference", "dense", "tiles", "rows"])
def test_gradients_twice(kernel):
    # The kernels sum in float32, so finite differences need float64: compare with the dense product instead.
    mask = make_mask("bits", 12, 10, (4, 4), permuted=True)
    inputs = [torch.randn(*shape, requires_grad=True) for shape in ((5, 10), (12, 10), (12,))]

    def twice(function):
        first = torch.autograd.grad(function().square().sum(), inputs, create_graph=True)
        return *first, *torch.autograd.grad(sum(g.square().sum() for g in first), inputs[:2])

    ours = twice(lambda: masked_matmul(inputs[0], inputs[1], mask, inputs[2], backend=kernel))
    truth = twice(lambda: masked_matmul_reference(inputs[0], inputs[1], mask.tensors, inputs[2]))
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.detach().abs().max().item())


def test_the_reference_passes_gradcheck():
    mask = make_mask("bits", 6, 5, (4, 4), permuted=True)
    inputs = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((4, 5), (6, 5), (6,))]
    assert torch.autograd.gradcheck(
        lambda x, w, b: masked_matmul_reference(x, w, mask.tensors, b), inputs, check_forward_ad=False
    )


def test_int8_tiles_are_straight_through_and_once_differentiable():
    mask = make_mask("int8", 16, 16, (8, 8))
    x, weight = torch.randn(4, 16), torch.randn(16, 16, requires_grad=True)
    mask.quantise(weight)
    (grad,) = torch.autograd.grad(masked_matmul(x, weight, mask).sum(), weight, create_graph=True)
    torch.testing.assert_close(grad, (torch.ones(4, 16).t() @ x) * mask.dense())
    x.requires_grad_()
    (grad,) = torch.autograd.grad(masked_matmul(x, weight, mask).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        grad.sum().backward()


def test_a_mask_changed_before_backward_is_noticed():
    mask = make_mask("bits", 16, 16, (8, 8))
    weight = torch.randn(16, 16, requires_grad=True)
    y = masked_matmul(torch.randn(4, 16), weight, mask, backend="tiles")
    mask.update(dense=torch.rand(16, 16) < 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_opcheck():
    mask = make_mask("bits", 20, 24, (8, 8), permuted=True)
    fields = (*mask.tensors[2:], list(mask.shape), list(mask.tile))
    x, weight, bias, grad = (torch.randn(*s, requires_grad=True) for s in ((5, 24), (20, 24), (20,), (5, 20)))
    ops = torch.ops.rlnas_fast
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for op, args in (
        (ops.masked_matmul, (x, weight, bias, *fields, False, "tiles")),
        (ops.masked_matmul_grad_input, (grad, weight, *fields, "tiles")),
        (ops.masked_matmul_grad_weight, (grad, x, *fields, "rows")),
        (ops.masked_matmul_gradients, (grad.detach(), x.detach(), weight.detach(), *fields, "rows")),
    ):
        torch.library.opcheck(op.default, args, test_utils=tests)


def test_compiles_whole_with_changing_batches_and_masks():
    mask = make_mask("bits", 20, 24, (8, 8))
    weight = torch.randn(20, 24, requires_grad=True)
    compiled = torch.compile(
        lambda x, w: masked_matmul(x, w, mask, backend="tiles").relu(),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for batch in (3, 5, 8):
        mask.update(dense=torch.rand(20, 24) < 0.5)
        x = torch.randn(batch, 24)
        y = compiled(x, weight)
        torch.testing.assert_close(y, F.linear(x, weight * mask.dense()).relu())
        (grad,) = torch.autograd.grad(y.sum(), weight)
        assert not grad[~mask.dense()].any()


def test_autocast_casts_like_linear():
    mask = make_mask("bits", 20, 24, (8, 8))
    x, weight = torch.randn(5, 24), torch.randn(20, 24, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = masked_matmul(x, weight, mask)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert weight.grad.dtype == torch.float32


@pytest.mark.parametrize("kernel", ["dense", "tiles", "rows", "direct"])
def test_packed_products_equal_unpacked_ones(kernel):
    mask = make_mask("int8", 45, 70, (16, 32), permuted=True)
    weight, bias = torch.randn(45, 70), torch.randn(45)
    mask.quantise(weight)
    packed = pack(weight, mask, backend=kernel)
    for batch in (6,) if kernel == "direct" else (6, 40):
        x = torch.randn(batch, 70)
        ours = masked_matmul(x, weight, mask, bias, packed=packed)
        torch.testing.assert_close(ours, masked_matmul(x, weight, mask, bias, backend="reference"))
    with pytest.raises(ConfigError, match="no gradients"):
        masked_matmul(x.requires_grad_(), weight, mask, packed=packed)


@pytest.mark.parametrize("kernel", ["dense", "tiles", "rows", "direct"])
@pytest.mark.parametrize("kind", ["full", "bits", "int8"])
@pytest.mark.parametrize("width", [32, 7])
def test_packed_products_leave_out_columns_that_no_tile_reads(kernel, kind, width):
    mask, weight = make_mask(kind, 45, 150, (16, width), permuted=True), torch.randn(45, 150)
    for dead in (slice(1, 3), slice(-1, None), slice(0, -1)):
        state = mask.state.clone()
        state[:, dead] = 0
        changed = TileMask.from_tensors(mask.tensors.map(torch.clone))
        changed.update(state=state)
        if kind == "int8":
            changed.quantise(weight)
        packed = pack(weight, changed, backend=kernel)
        if kernel in ("tiles", "rows"):  # the last tile is ragged
            assert packed.mask.shape[1] == len(packed.mask.input_permutation) < 150
        for batch in (5,) if kernel == "direct" else (5, 20):
            x = torch.randn(batch, 150)
            ours = masked_matmul(x, weight, changed, packed=packed)
            unpacked = masked_matmul(x, weight, changed, backend=kernel)
            torch.testing.assert_close(ours, unpacked)
            torch.testing.assert_close(ours, masked_matmul(x, weight, changed, backend="reference"))


@pytest.mark.parametrize("kernel", ["dense", "tiles", "rows", "direct"])
def test_packed_products_take_any_strides_and_refuse_what_does_not_fit(kernel):
    mask, weight = make_mask("bits", 45, 70, (16, 32)), torch.randn(45, 70)
    packed = pack(weight, mask, backend=kernel)
    bias = torch.randn(45, 2)[:, 0]
    wide = torch.randn(3, 2, 71)
    for x in (wide[0, :1, :70], wide[0, :, 1:], torch.randn(70, 5).t(), wide[..., 1:], torch.randn(0, 70)):
        ours = masked_matmul(x, weight, mask, bias, packed=packed)
        torch.testing.assert_close(ours, masked_matmul(x, weight, mask, bias, backend="reference"))
    x, bias = torch.randn(2, 70), torch.randn(45)
    negated = torch._neg_view(x), torch._neg_view(bias)  # -x and -bias, not written out
    torch.testing.assert_close(
        masked_matmul(negated[0], weight, mask, negated[1], packed=packed),
        -masked_matmul(x, weight, mask, bias, packed=packed),
    )
    with pytest.raises(ShapeError, match="x must end in 70"):
        masked_matmul(torch.randn(1, 69), weight, mask, packed=packed)
    with pytest.raises(ShapeError, match="bias must be"):
        masked_matmul(torch.randn(1, 70), weight, mask, torch.randn(44), packed=packed)
    with pytest.raises(ConfigError):
        masked_matmul(torch.randn(1, 70).bfloat16(), weight, mask, packed=packed)


@pytest.mark.parametrize("kernel", ["tiles", "rows"])
def test_a_gradient_of_many_megabytes(kernel):
    mask = TileMask.from_scores(torch.rand(1100, 1030), 0.05)
    grad, x = torch.randn(9, 1100), torch.randn(9, 1030)
    ours = kernels.grad_weight(grad, x, mask.tensors, kernel)
    torch.testing.assert_close(ours, (grad.t() @ x) * mask.dense())


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("kernel", ["tiles", "rows"])
def test_products_packed_by_two_threads(isa, kernel):
    """What a task writes past its own must not reach another's."""
    cases = [
        ("tiles", (32, 32), (70, 1100), 65, False),  # past the caches
        ("bits", (13, 20), (53, 603), 130, True),
        ("bits", (270, 300), (310, 560), 150, False),  # tiles larger than what a task packs
    ]
    for kind, tile, (rows, cols), batch, permuted in cases:
        mask = make_mask(kind, rows, cols, tile, permuted=permuted)
        weight = torch.randn(rows, cols)
        grad, x = torch.randn(batch, rows + 3)[:, 3:], torch.randn(batch, cols)

        def run(kernel, cast, weight=weight, grad=grad, x=x, mask=mask):
            w, g, z = weight.to(cast), grad.to(cast), x.to(cast)
            return (
                kernels.forward(z, w, mask.tensors, None, kernel=kernel),
                kernels.grad_input(g, w, mask.tensors, kernel),
                kernels.grad_weight(g, z, mask.tensors, kernel),
                *kernels.gradients(g, z, w, mask.tensors, kernel),
            )

        dense, truth = run("dense", torch.float32), run("dense", torch.float64)
        _poison()
        ours = run(kernel, torch.float32)
        for o, d, t in zip(ours, dense, truth, strict=True):
            assert error(o, t) <= 2 * error(d, t) + torch.finfo(torch.float32).eps
        assert not ours[2][~mask.dense()].any()
        assert not ours[4][~mask.dense()].any()


def test_the_cost_model_is_measured_once_and_says_what_it_chose(monkeypatch):
    sparse = TileMask.from_scores(torch.rand(1024, 1024), 0.02, whole_tiles=True)
    told = plan(256, sparse)
    assert told["kernel"] in ("tiles", "rows")
    assert told["speedup"] > 1
    assert told["multiply_adds"] == 256 * sparse.nonzeros()
    cost_model._coefficients.cache_clear()
    monkeypatch.setattr(cost_model, "measure", lambda *_: pytest.fail("measured twice"))
    assert plan(256, sparse) == told
    x, weight = torch.randn(256, 1024), torch.randn(1024, 1024)
    torch.testing.assert_close(
        masked_matmul(x, weight, sparse), F.linear(x, weight * sparse.dense()), rtol=1e-4, atol=1e-4
    )


@pytest.mark.usefixtures("two_threads")
def test_the_same_call_gives_the_same_bits():
    mask = make_mask("bits", 256, 300, (32, 32))
    x, weight, grad = torch.randn(40, 300), torch.randn(256, 300), torch.randn(40, 256)
    for kernel in ("tiles", "rows"):
        runs = [
            (
                kernels.forward(x, weight, mask.tensors, None, kernel=kernel),
                kernels.grad_input(grad, weight, mask.tensors, kernel),
                kernels.grad_weight(grad, x, mask.tensors, kernel),
            )
            for _ in range(3)
        ]
        assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))


def test_useful_work_is_counted():
    from torch.utils.flop_counter import FlopCounterMode

    mask = make_mask("bits", 20, 24, (8, 8))
    weight = torch.randn(20, 24, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        masked_matmul(torch.randn(7, 24), weight, mask).sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 7 * mask.nonzeros()  # forward and the gradient to the weight
    with FlopCounterMode(display=False) as counter:
        masked_matmul(torch.randn(7, 24, requires_grad=True), weight, mask).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 7 * mask.nonzeros()


def test_who_watches_operators_sees_the_product_without_gradients_too():
    from torch.utils.flop_counter import FlopCounterMode

    mask = make_mask("bits", 20, 24, (8, 8))
    weight, x = torch.randn(20, 24), torch.randn(7, 24)
    expected = F.linear(x, weight * mask.dense())
    with FlopCounterMode(display=False) as counter:
        masked_matmul(x, weight, mask)
    assert counter.get_total_flops() == 2 * 7 * mask.nonzeros()
    traced = torch.fx.experimental.proxy_tensor.make_fx(lambda x: masked_matmul(x, weight, mask))(x)
    assert any("masked_matmul" in str(node.target) for node in traced.graph.nodes)
    torch.testing.assert_close(traced(x), expected)
    with torch.inference_mode():
        torch.testing.assert_close(masked_matmul(x, weight, mask), expected)
    negative = torch.complex(torch.zeros(7, 24), x).conj().imag  # -x, not written out
    assert negative.is_neg()
    torch.testing.assert_close(masked_matmul(negative, weight, mask), -expected)


def test_a_new_mask_is_a_new_choice():
    mask, weight, x = TileMask((64, 96), unstructured=True), torch.randn(64, 96), torch.randn(5, 96)
    for density in (1.0, 0.5, 0.02, 0.0):
        dense = torch.rand(64, 96) < density
        mask.update(dense=dense)
        torch.testing.assert_close(masked_matmul(x, weight, mask), F.linear(x, weight * dense))


X, W, M = torch.ones(3, 8), torch.ones(4, 8), TileMask((4, 8))


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: masked_matmul(torch.ones(3, 7), W, M), ShapeError, "x must end in 8"),
        (lambda: masked_matmul(X, torch.ones(8), M), ShapeError, "weight"),
        (lambda: masked_matmul(X, W, M, torch.ones(5)), ShapeError, "bias"),
        (lambda: masked_matmul(X, W, TileMask((8, 4))), ShapeError, "mask"),
        (lambda: masked_matmul(X, W, torch.ones(4, 7) > 0), ShapeError, "mask"),
        (lambda: masked_matmul(X, W, torch.ones(4, 8, dtype=torch.int64)), ConfigError, "mask .*int64"),
        (lambda: masked_matmul(X, W, None), ConfigError, "mask .*NoneType"),
        (lambda: masked_matmul(X.double(), W.double(), M), ConfigError, "x .*float64"),
        (lambda: masked_matmul(X, W.bfloat16(), M), ConfigError, "weight .*bfloat16"),
        (lambda: masked_matmul(X, W.to("meta"), M), ShapeError, "weight is on meta"),
        (lambda: masked_matmul(X, W, M, backend="fast"), ConfigError, "unknown backend 'fast'"),
        (lambda: masked_matmul(X, W, M, backend="triton"), KernelUnavailable, "CUDA"),
        (lambda: masked_matmul(torch.ones(9, 8), W, M, backend="direct"), ConfigError, "at most 8"),
    ],
)
def test_bad_input_is_refused_by_name(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
