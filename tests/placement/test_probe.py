"""Statistics of activations: against what NumPy says, sampled against all, and no trace afterwards."""

from __future__ import annotations

import copy
import gc
import math
import weakref

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rlnas_fast.errors import ConfigError, DataError, ShapeError
from rlnas_fast.networks import StageCNN
from rlnas_fast.ops import native
from rlnas_fast.placement import probe as probe_module
from rlnas_fast.placement.inserter import NonLocalInserter
from rlnas_fast.placement.probe import BINS, REACH, ActivationProbe, layer_statistics


def images(count: int = 32, side: int = 32) -> Tensor:
    """Smooth ones, each brighter or darker than others."""
    noise = torch.randn(count, 3, side + 4, side + 4)
    return 3 * torch.nn.functional.avg_pool2d(noise, 5, 1) + 0.5 * torch.randn(count, 1, 1, 1)


def activations() -> Tensor:
    """Of a rectifier, with channels that go together."""
    common = torch.randn(64, 1, 16, 16)
    return (0.6 * common + 0.8 * torch.randn(64, 12, 16, 16) - 0.3).relu()


def test_all_values_as_numpy_says() -> None:
    x = activations()
    seen = layer_statistics(x)
    values = x.double().numpy()
    rows = values.transpose(1, 0, 2, 3).reshape(12, -1)
    correlations = np.corrcoef(rows)
    off = correlations[~np.eye(12, dtype=bool)]
    assert seen.mean == pytest.approx(values.mean(), rel=1e-5)
    assert seen.variance == pytest.approx(values.var(), rel=1e-5)
    assert seen.sparsity == pytest.approx((values == 0).mean(), abs=1e-12)
    # The two halves of the samples stand in for one another: the rest is their noise.
    assert seen.correlation == pytest.approx(math.sqrt((off**2).mean()), rel=5e-3)
    spread = (values - values.mean()) / values.std()
    inside = np.clip((spread[values != 0] + REACH) * BINS / (2 * REACH), 0, BINS - 1).astype(int)
    share = np.append(np.bincount(inside, minlength=BINS), (values == 0).sum()) / values.size
    plain = -(share[share > 0] * np.log(share[share > 0])).sum()
    assert seen.entropy == pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_sample_is_within_two_percent_of_all(memory_format: torch.memory_format) -> None:
    x = torch.cat([activations() for _ in range(4)]).contiguous(memory_format=memory_format)
    everything = layer_statistics(x)
    sampled = layer_statistics(x, values=2**17)
    assert everything != sampled
    for name, one, other in zip(everything._fields, sampled, everything, strict=True):
        assert one == pytest.approx(other, rel=0.02), name
    assert layer_statistics(x, values=2**17) == sampled


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("width", [8, 16])
def test_so_is_a_sample_of_what_flows_through_a_network(width: int, seed: int) -> None:
    torch.manual_seed(seed)
    network, stages = StageCNN(3, 10, width), ["stage1", "stage2", "stage3"]
    with ActivationProbe(network, stages) as some, ActivationProbe(network, stages, values=None) as all_:
        network(images(128))
        for name in stages:
            assert some.statistics[name] == pytest.approx(all_.statistics[name], rel=0.02), name


SHAPES = ((16, 6, 12, 10), (3, 1, 5, 5), (64, 70, 4, 4), (9, 33), (2, 300, 7), (4, 5, 3, 3, 3), (2, 1, 1, 1))


@pytest.mark.parametrize("isa", native.cpu().usable_isas())
def test_the_kernel_agrees_with_torch(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def statistics(x: Tensor, values: int | None) -> probe_module.LayerStatistics:
        with monkeypatch.context() as without:
            without.setattr(probe_module, "_kernel", lambda: None)
            return layer_statistics(x, values=values)

    native.cpu().set_isa(isa)
    try:
        for shape in SHAPES:
            x = (torch.randn(shape) + 0.3 * torch.randn(shape[0], 1, *shape[2:])).relu()
            for given in (x, x.transpose(1, -1).contiguous().transpose(1, -1), x - 100):
                for values in (None, 1, 500):
                    ours, theirs = layer_statistics(given, values=values), statistics(given, values)
                    assert ours == pytest.approx(theirs, rel=1e-3, abs=2e-5), (shape, values)
                    assert layer_statistics(given.double(), values=values) == pytest.approx(
                        ours, rel=1e-3, abs=2e-5
                    )
    finally:
        native.cpu().set_isa("auto")


def test_activations_that_are_negated_without_being_written_out() -> None:
    x = torch.complex(torch.zeros(8, 6, 5, 5), activations()[:8, :6, :5, :5]).conj().imag
    assert x.is_neg()
    assert layer_statistics(x) == layer_statistics(x.resolve_neg())


def test_threads_change_nothing() -> None:
    x, found = activations(), set()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found |= {(layer_statistics(x), layer_statistics(x, values=5000))}
    assert len(found) == 1


def test_strides_do_not_matter_but_shapes_may_be_any() -> None:
    x = torch.randn(16, 6, 12, 10)
    assert layer_statistics(x.contiguous(memory_format=torch.channels_last), values=2000) == pytest.approx(
        layer_statistics(x, values=2000), rel=1e-5
    )
    for shape in ((8, 5), (8, 5, 7), (4, 5, 3, 3, 3), (1, 1, 2, 2), (2, 1, 1, 1)):
        for values in (None, 1, 17):
            seen = layer_statistics(torch.randn(shape), values=values)
            assert all(map(math.isfinite, seen)), (shape, values)


def test_scaled_and_constant_activations() -> None:
    x = activations()
    one, other = layer_statistics(x), layer_statistics(4 * x)
    assert (other.entropy, other.sparsity, other.correlation) == pytest.approx(
        (one.entropy, one.sparsity, one.correlation), rel=1e-5
    )
    flat = layer_statistics(torch.full((4, 3, 5, 5), 2.0))
    assert (flat.mean, flat.variance, flat.sparsity, flat.correlation) == (2.0, 0.0, 0.0, 0.0)
    assert flat.entropy == pytest.approx(0.0, abs=1e-6)
    assert layer_statistics(torch.zeros(4, 3, 5, 5)).sparsity == 1.0


def test_a_probe_watches_passes_and_observes_without_a_trace() -> None:
    network, x = StageCNN(3, 10).train(), images()
    before = copy.deepcopy(network.state_dict())
    calls = []
    network.stage3.register_forward_hook(lambda *_: calls.append(1))
    probe = ActivationProbe(network, ["stage1", "stage2"])
    state = probe.observe(x)
    assert state.shape == (probe.features,) == (10,)
    assert state.dtype == torch.float32
    assert not calls  # no further than the last layer
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert state[1] == pytest.approx(math.log1p(probe.statistics["stage1"].variance), rel=1e-6)
    network(x + 1).sum().backward()
    assert calls == [1]
    assert not torch.equal(probe.state(), state)
    probe.close()
    assert not network.stage1._forward_hooks


def test_what_is_not_worked_out_at_once_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = StageCNN(3, 10), images(8, 16)
    with ActivationProbe(network, ["stage3", "stage1"]) as probe:
        state = probe.observe(x)
        monkeypatch.setattr(probe_module, "_kernel", lambda: None)
        assert torch.allclose(probe.observe(x), state, rtol=1e-4)
        with pytest.raises(DataError, match="'stage3' has NaN"):
            probe.observe(torch.full((2, 3, 8, 8), float("nan")))
    half = network.bfloat16()
    with ActivationProbe(half, ["stage3", "stage1"]) as probe:
        assert torch.allclose(probe.observe(x.bfloat16()), state, rtol=0.1, atol=0.05)


def test_it_watches_before_a_block() -> None:
    network, x = StageCNN(3, 10).train(), images(8, 8)
    inserter = NonLocalInserter(network, x)
    inserter.insert("stage1")
    nn.init.ones_(inserter.block(1).W[1].weight)
    with ActivationProbe(network, ["stage1"]) as probe:
        with_block = probe.observe(x)
        inserter.remove()
        assert torch.equal(probe.observe(x), with_block)


def test_nothing_of_a_pass_is_kept() -> None:
    network, x = StageCNN(3, 10), images(4, 8)
    with ActivationProbe(network, ["stage1"]) as probe:
        held = []
        handle = network.stage1.register_forward_hook(lambda m, a, out: held.append(weakref.ref(out)))
        network(x)
        gc.collect()
        assert held[0]() is None
        assert probe.statistics["stage1"].variance > 0
        handle.remove()
        reference = weakref.ref(probe)
    del probe
    gc.collect()
    assert reference() is None


def test_bad_input_is_named() -> None:
    network = StageCNN(3, 10)
    with pytest.raises(ConfigError, match=r"did you mean 'stage1\.1'"):
        ActivationProbe(network, ["stage11"])
    with pytest.raises(ConfigError, match="layers is empty"):
        ActivationProbe(network, [])
    with pytest.raises(ConfigError, match="values = 0"):
        ActivationProbe(network, ["stage1"], values=0)
    with ActivationProbe(network, ["stage1"]) as probe:
        with pytest.raises(DataError, match="'stage1' has not run"):
            probe.state()
        with pytest.raises(DataError, match="'stage1' has NaN"):
            probe.observe(torch.full((2, 3, 8, 8), float("nan")))
        with pytest.raises(ShapeError, match="does not take a batch"):
            probe.observe(torch.randn(2, 5, 8, 8))
        assert network.training
    tuples = nn.Sequential(nn.LSTM(8, 8))
    with ActivationProbe(tuples, ["0"]) as probe, pytest.raises(ShapeError, match="'0' answers with tuple"):
        probe.observe(torch.randn(2, 3, 8))
