"""A block that goes in and out: identity, exact reversal, kept weights, compiled networks, bad input."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

from rlnas_fast.errors import ConfigError, DataError, RlnasError, ShapeError
from rlnas_fast.networks import ResNet, StageCNN
from rlnas_fast.placement.inserter import NonLocalInserter
from rlnas_fast.placement.stages import find_stages, generate_non_local_block


def batch(side: int = 8, count: int = 4) -> Tensor:
    return torch.randn(count, 3, side, side)


def sgd(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


def adamw(network: nn.Module) -> torch.optim.Optimizer:
    decayed = [p for p in network.parameters() if p.dim() > 1]
    others = [p for p in network.parameters() if p.dim() <= 1]
    return torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0.0}], lr=1e-3)


def train_step(network: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(network(x), torch.arange(len(x)) % 10).backward()
    optimizer.step()


def picture(network: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Everything that has to be as it was."""
    seen: dict[str, Any] = {
        "state": {name: tensor.clone() for name, tensor in network.state_dict().items()},
        "modules": [(name, id(module)) for name, module in network.named_modules()],
        "modes": [module.training for module in network.modules()],
        "hooks": [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for m in network.modules()
        ],
        "gradients": [None if p.grad is None else p.grad.clone() for p in network.parameters()],
    }
    if optimizer is not None:
        seen["optimizer"] = copy.deepcopy(optimizer.state_dict())
        seen["parameters"] = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    return seen


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.mark.parametrize("make", [StageCNN, ResNet])
def test_the_last_module_at_each_size_is_found(make: Callable[[int, int], nn.Module]) -> None:
    stages = find_stages(make(3, 10), batch(16))
    assert [stage.name for stage in stages] == ["stage1", "stage2", "stage3"]
    assert [stage.shape for stage in stages] == [(16, 16, 16), (32, 8, 8), (64, 4, 4)]


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_block_fits_what_flows(dims: int) -> None:
    convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    network = nn.Sequential(
        convolution(2, 6, 3, padding=1), nn.ReLU(), convolution(6, 4, 2, stride=2)
    ).double()
    x = torch.randn(3, 2, *(6,) * dims, dtype=torch.float64)
    stages = find_stages(network, x)
    assert [stage.name for stage in stages] == ["1", "2"]
    block = generate_non_local_block(x, stages[0], kind="dot_product", inner_channels=2)
    assert (block.channels, block.inner_channels, block.dims) == (6, 2, dims)
    assert {p.dtype for p in block.parameters()} == {torch.float64}


def test_a_new_block_is_the_identity_and_leaves_the_random_state() -> None:
    network, x = StageCNN(3, 10), batch()
    before = network.eval()(x)
    network.train()
    state = torch.get_rng_state()
    inserter = NonLocalInserter(network, x)
    for name in inserter.names[1:]:
        inserter.insert(name)
        assert torch.equal(network.eval()(x), before)
        network.train()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("make", [sgd, adamw])
def test_inserting_and_removing_leaves_no_trace(
    make: Callable[[nn.Module], torch.optim.Optimizer],
) -> None:
    network, x = ResNet(3, 10), batch()
    optimizer = make(network)
    train_step(network, optimizer, x)
    before = picture(network, optimizer)
    inserter = NonLocalInserter(network, x, optimizer=optimizer)
    for stage in (1, 3, "stage2", 0, 2):
        inserter.insert(stage)
    inserter.close()
    assert same(picture(network, optimizer), before)


@pytest.mark.parametrize("make", [sgd, adamw])
def test_a_saved_state_comes_back_bit_for_bit(make: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
    network, x = StageCNN(3, 10), batch()
    optimizer = make(network)
    inserter = NonLocalInserter(network, x, optimizer=optimizer)
    for stage in (1, 2, 1):
        inserter.insert(stage)
        train_step(network, optimizer, x)
    saved = inserter.state_dict()
    before = picture(network, optimizer)
    for stage in (3, 2, 0, 1):
        inserter.insert(stage)
        train_step(network, optimizer, x)
    assert not same(picture(network, optimizer)["state"], before["state"])
    inserter.load_state_dict(saved)
    after = picture(network, optimizer)
    del before["gradients"], after["gradients"]
    assert same(after, before)
    assert inserter.inserted == 1


def test_the_blocks_weights_and_momentum_wait_for_their_stage() -> None:
    network, x = StageCNN(3, 10), batch()
    optimizer = adamw(network)
    inserter = NonLocalInserter(network, x, optimizer=optimizer)
    inserter.insert(1)
    for _ in range(3):
        train_step(network, optimizer, x)
    block = inserter.block(1)
    weights = [p.clone() for p in block.parameters()]
    moments = [optimizer.state[p]["exp_avg"].clone() for p in block.parameters()]
    assert any(moment.any() for moment in moments)
    inserter.insert(2)
    assert not any(p in optimizer.state for p in block.parameters())
    train_step(network, optimizer, x)
    inserter.insert("stage1")
    assert inserter.block("stage1") is block
    assert all(map(torch.equal, block.parameters(), weights))
    assert all(
        torch.equal(optimizer.state[p]["exp_avg"], m)
        for p, m in zip(block.parameters(), moments, strict=True)
    )
    assert sum(p in set(block.parameters()) for g in optimizer.param_groups for p in g["params"]) == len(
        weights
    )


def test_a_schedule_and_named_parameters_go_on_working() -> None:
    network, x = StageCNN(3, 10), batch()
    optimizer = torch.optim.SGD(network.named_parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    inserter = NonLocalInserter(network, x, optimizer=optimizer)
    for stage in (1, 2, 0):
        inserter.insert(stage)
        train_step(network, optimizer, x)
        schedule.step()
        group = optimizer.param_groups[0]
        assert len(group["params"]) == len(group["param_names"])


def test_the_stage_keeps_its_keys_attributes_and_mode() -> None:
    network, x = StageCNN(3, 10), batch()
    plain = copy.deepcopy(network)
    inserter = NonLocalInserter(network, x)
    inserter.insert(2)
    inserted = network.state_dict()
    added = {key for key in inserted if ".inserted_block." in key}
    assert set(inserted) - added == set(plain.state_dict())
    network.load_state_dict(inserted)
    plain.load_state_dict({key: value for key, value in inserted.items() if key not in added})
    assert network.stage2[0] is network.stage2.stage[0]
    assert network.stage2.append  # an attribute of the stage itself
    network.eval()
    assert not inserter.block(2).training
    inserter.remove()
    network.train()
    inserter.insert(2)
    assert inserter.block(2).training


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own
def test_a_compiled_network_compiles_once_for_each_stage() -> None:
    torch._dynamo.reset()
    counters.clear()
    network, x = StageCNN(3, 10), batch()
    compiled = torch.compile(network, backend="eager")
    inserter = NonLocalInserter(compiled, x)
    for stage in (0, 1, 2, 3, 1, 3, 0, 2):
        inserter.insert(stage)
        compiled(x).sum().backward()
    assert counters["stats"]["unique_graphs"] == 4
    assert not counters["graph_break"]
    torch.manual_seed(1)
    for block in (inserter.block(stage) for stage in (1, 2, 3)):
        nn.init.ones_(block.W[1].weight)
    inserter.insert(2)
    network.eval()
    torch.testing.assert_close(compiled(x), network(x))
    inserter.insert(0)
    torch.testing.assert_close(compiled(x), network(x))
    torch._dynamo.reset()


class Counts(nn.Module):
    """Calls a convolution twice, and never one."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.never = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.parts = nn.ModuleDict({"pair": nn.LSTM(8, 8, batch_first=True)})
        self.inside = nn.Sequential(nn.Conv2d(3, 3, 1))
        self.hidden = [self.inside[0]]
        self.last = nn.Linear(3, 10)

    def forward(self, x: Tensor) -> Tensor:
        self.parts["pair"](x[:, 0])
        x = self.hidden[0](self.twice(self.twice(x)))
        return self.last(x.mean(dim=(2, 3)))


class Changing(nn.Module):
    """Its channels depend on the values or the number of samples."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.by, self.stage, self.last = by, nn.Identity(), nn.Linear(1, 10)

    def forward(self, x: Tensor) -> Tensor:
        narrow = len(x) < 3 if self.by == "count" else bool((x == 0).all())
        x = self.stage(x[:, :2] if narrow else x)
        return self.last(x.mean(dim=(1, 2, 3))[:, None])


def frozen_cnn() -> nn.Module:
    network = StageCNN(3, 10)
    network.stage2[0][1].eval()
    return network


def diverged_cnn() -> nn.Module:
    network = StageCNN(3, 10)
    nn.init.constant_(network.stage2[0][0].weight, float("nan"))
    return network


def shared_cnn() -> nn.Module:
    network = StageCNN(3, 10)
    network.keeper = [NonLocalInserter(network, batch())]  # keeps it alive
    return network


@pytest.mark.parametrize(
    ("make", "stages", "error", "says"),
    [
        (lambda: StageCNN(3, 10), ["stage4"], ConfigError, "did you mean 'stage"),
        (lambda: StageCNN(3, 10), [], ConfigError, "stages is empty"),
        (lambda: StageCNN(3, 10), ["stage1", "stage1"], ConfigError, "once"),
        (lambda: StageCNN(3, 10), ["classifier"], ShapeError, "'classifier' answers with shape [4, 10]"),
        (lambda: StageCNN(1, 10), None, ShapeError, "does not take a batch (4, 3, 8, 8)"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), None, ConfigError, "no module"),
        (Counts, ["twice"], ConfigError, "runs 2 times"),
        (Counts, ["never"], ConfigError, "never called"),
        (Counts, ["inside"], ConfigError, "never called"),
        (Counts, ["inside.0"], ConfigError, "another way"),
        (Counts, ["parts.pair"], ShapeError, "a tuple"),
        (lambda: Changing("count"), ["stage"], ShapeError, "shapes change with its input"),
        (diverged_cnn, ["stage2"], DataError, "'stage2' answers with NaN"),
        (shared_cnn, None, ConfigError, "shared"),
    ],
)  # fmt: skip
def test_bad_input_is_named_and_the_network_left_alone(
    make: Callable[[], nn.Module], stages: list[str] | None, error: type[RlnasError], says: str
) -> None:
    network = make()
    before = picture(network)
    with pytest.raises(error) as raised:
        NonLocalInserter(network, batch(), stages)
    assert says in str(raised.value)
    after = picture(network)
    if make is diverged_cnn:
        del before["state"], after["state"]  # NaN is not equal to itself
    assert same(after, before)


def test_batch_norm_in_evaluation_is_named_unless_the_block_was_trained() -> None:
    network, x = StageCNN(3, 10), batch()
    inserter = NonLocalInserter(network, x)
    inserter.insert(1)
    network(x)
    network.eval()
    before = picture(network)
    with pytest.raises(ConfigError, match=r"stage2\.0\.1 is in evaluation mode.*call train\(\)"):
        inserter.insert(2)
    assert same(picture(network), before)
    inserter.insert(0)
    inserter.insert(1)  # its BatchNorm has seen a batch
    with pytest.raises(ConfigError, match=r"stage1\.0\.1"):
        NonLocalInserter(frozen := StageCNN(3, 10).eval(), x).insert(1)
    NonLocalInserter(frozen, x, norm=False).insert(1)


def test_a_frozen_batch_norm_is_named() -> None:
    with pytest.raises(ConfigError, match=r"BatchNorm stage2\.0\.1"):
        NonLocalInserter(frozen_cnn(), batch()).insert(2)


def test_shapes_that_change_later_are_named_by_stage() -> None:
    network = Changing("values")
    inserter = NonLocalInserter(network, batch(), ["stage"])
    inserter.insert(1)
    network(batch())
    with pytest.raises(ShapeError, match="stage 'stage' now answers with shape"):
        network(torch.zeros(4, 3, 8, 8))
    inserter.remove()
    network(torch.zeros(4, 3, 8, 8))


def test_one_inserter_at_a_time_and_an_empty_batch() -> None:
    network, x = StageCNN(3, 10), batch()
    with pytest.raises(DataError, match="at least one sample"):
        NonLocalInserter(network, x[:0])
    with NonLocalInserter(network, x) as inserter:
        inserter.insert(1)
        with pytest.raises(ConfigError, match="shared"):
            NonLocalInserter(network, x)
        with pytest.raises(ConfigError, match="has a block already, on its module 'stage1'"):
            NonLocalInserter(copy.deepcopy(network), x)
        with pytest.raises(ConfigError, match="shared"):
            NonLocalInserter(network.stage2, torch.randn(4, 16, 8, 8))
        with pytest.raises(ConfigError, match="no stage 7"):
            inserter.insert(7)
        with pytest.raises(ConfigError, match="no stage 'stage9': choose from none, stage1"):
            inserter.insert("stage9")
    again = NonLocalInserter(network, x)
    del again  # one that nobody holds claims nothing
    NonLocalInserter(network, x)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=8), st.sampled_from([sgd, adamw]))
@settings(max_examples=10, deadline=None)
def test_any_order_of_stages_is_undone(
    stages: list[int], make: Callable[[nn.Module], torch.optim.Optimizer]
) -> None:
    network, x = StageCNN(3, 10), batch(8, 2)
    optimizer = make(network)
    inserter = NonLocalInserter(network, x, optimizer=optimizer)
    saved, before = inserter.state_dict(), picture(network, optimizer)
    for stage in stages:
        inserter.insert(stage)
        train_step(network, optimizer, x)
    inserter.load_state_dict(saved)
    inserter.close()
    after = picture(network, optimizer)
    del before["gradients"], after["gradients"]
    assert same(after, before)
