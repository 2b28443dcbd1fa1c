"""q, k, v and gate, up as one call: the results of each by itself, in every state of an adapter."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import kore_fast as kf
from kore_fast.modules import shared_input as module
from kore_fast.modules.adapter import lora_layers
from kore_fast.modules.linear import kore_linears


class Block(nn.Module):
    """Three layers of one x, then two of another, and one that reads alone."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, width) for width in (16, 8, 8))
        self.gate, self.up = nn.Linear(16, 24, bias=False), nn.Linear(16, 24, bias=False)
        self.down = nn.Linear(24, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.q(x).tanh() * torch.cat([self.k(x), self.v(x)], -1)
        return x + self.down(self.gate(x).sigmoid() * self.up(x))


class Net(nn.Module):
    def __init__(self, *, checkpointed: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.checkpointed = checkpointed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
        return x


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each call computed."""
    found: list[int] = []
    real = module.frozen_lora_many

    def counted(x: torch.Tensor, W: Any, *args: Any, **kwargs: Any) -> list[torch.Tensor]:
        found.append(len(W))
        return real(x, W, *args, **kwargs)

    monkeypatch.setattr(module, "frozen_lora_many", counted)
    return found


def adapted(kind: str, *, checkpointed: bool = False) -> nn.Module:
    """A net with trained B, its layers together."""
    torch.manual_seed(0)
    net = Net(checkpointed=checkpointed)
    x = torch.randn(40, 16)
    store = kf.collect_covariance(net, [{"x": x}], target_modules=r"layers\.\d\.\w+")
    if kind == "peft":
        net = kf.get_kore_model(net, kf.KoreConfig(rank=4, target_modules=r"layers\.\d\.\w+"), store)  # type: ignore[assignment]
    else:
        kf.replace_linears(net, store, 4, r"layers\.\d\.\w+")
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return net


def layers_of(net: nn.Module) -> dict[str, Any]:
    return {**lora_layers(net), **kore_linears(net)}


def apart(net: nn.Module) -> nn.Module:
    """The same, each layer by itself."""
    other = copy.deepcopy(net)
    for layer in layers_of(other).values():
        layer.shared_input = None
    return other


def everything(net: nn.Module, run: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
    x = torch.randn(5, 3, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y = run(net, x)
    names = [name for name, p in net.named_parameters() if p.requires_grad]
    return [y, *torch.autograd.grad(y.square().sum(), [x, *(net.get_parameter(name) for name in names)])]


def same(net: nn.Module, run: Callable[[nn.Module, torch.Tensor], torch.Tensor] = lambda net, x: net(x)) -> None:
    for one, two in zip(everything(net, run), everything(apart(net), run), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["peft", "plain"])
def test_as_each_by_itself(kind: str, calls: list[int]) -> None:
    same(adapted(kind))
    assert calls == [3, 2] * 2


@pytest.mark.parametrize("kind", ["peft", "plain"])
def test_under_activation_checkpoints(kind: str, calls: list[int]) -> None:
    same(adapted(kind, checkpointed=True))
    assert calls == [3, 2] * 4  # forward, and again for backward


def test_while_b_is_zero_it_is_the_base(calls: list[int]) -> None:
    net = adapted("peft")
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    x = torch.randn(7, 16)
    y = net(x)
    assert calls
    with net.disable_adapter():  # type: ignore[operator]
        assert torch.equal(net(x), y)
    assert calls == [3, 2] * 2


def test_nothing_is_left_over(calls: list[int]) -> None:
    net = adapted("peft")
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            net(torch.randn(2, 16))
    groups = {id(layer.shared_input): layer.shared_input for layer in layers_of(net).values() if layer.shared_input}
    assert len(groups) == 4
    assert all(group._x is None and not group._waiting for group in groups.values())


def test_another_x_is_not_answered_with_the_last_one_s_result(calls: list[int]) -> None:
    net = adapted("plain")
    block = net.layers[0]  # type: ignore[index, union-attr]
    one, two = torch.randn(3, 16), torch.randn(3, 16)
    with torch.no_grad():
        block.q(one)
        torch.testing.assert_close(block.k(two), apart(net).layers[0].k(two))  # type: ignore[index, union-attr]
        block.q(one)
        changed = one.clone()
        one.add_(1)
        torch.testing.assert_close(block.k(one), apart(net).layers[0].k(changed + 1))  # type: ignore[index, union-attr]
        # Called twice with the same x.
        torch.testing.assert_close(block.k(one), block.k(one))


def trained(net: Any, layer: Any) -> None:
    with torch.no_grad():
        layer.lora_B["default"].weight.add_(1)


def rescaled(net: Any, layer: Any) -> None:
    layer.set_scale("default", 3)


def hooked(net: Any, layer: Any) -> None:
    layer.get_base_layer().register_forward_hook(lambda module, args, y: y + 1)


def switched_off(net: Any, layer: Any) -> None:
    layer.enable_adapters(False)


def switched_over(net: Any, layer: Any) -> None:
    net.add_adapter("other", net.peft_config["default"])
    torch.nn.init.normal_(layer.lora_B["other"].weight)
    layer.set_adapter("other")


@pytest.mark.parametrize("change", [trained, rescaled, hooked, switched_off, switched_over])
def test_what_changed_since_the_first_call_is_seen(change: Callable[[Any, Any], None], calls: list[int]) -> None:
    net = adapted("peft")
    block = net.get_submodule("base_model.model.layers.0")
    x = torch.randn(3, 16)
    before = block.k(x.clone())
    block.q(x)
    change(net, block.k)
    y = block.k(x)
    torch.testing.assert_close(y, apart(net).get_submodule("base_model.model.layers.0").k(x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(y, before)


def test_a_result_without_a_graph_is_not_one_to_train_with() -> None:
    block = adapted("plain").get_submodule("layers.0")
    x = torch.randn(3, 16)
    with torch.no_grad():
        block.q(x)
    assert block.k(x).requires_grad


def test_one_that_is_out_of_the_ordinary_sets_all_apart(calls: list[int]) -> None:
    net = adapted("peft")
    layers_of(net)["layers.0.k"].get_base_layer().register_forward_hook(lambda *_: None)
    same(net)
    assert calls == [2, 3, 2]


def test_merged_and_back(calls: list[int]) -> None:
    net = adapted("plain")
    x = torch.randn(4, 16)
    expected = net(x)
    for layer in layers_of(net).values():
        layer.merge()
    del calls[:]
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)
    assert not calls
    for layer in layers_of(net).values():
        layer.unmerge()
    assert torch.equal(net(x), expected)


def test_copies_are_their_own(calls: list[int]) -> None:
    net = adapted("plain")
    x = torch.randn(4, 16)
    net.layers[0].q(x)  # type: ignore[index, union-attr]
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        members = other.layers[0].q.shared_input.layers
        assert members == (other.layers[0].q, other.layers[0].k, other.layers[0].v)
        torch.testing.assert_close(other(x), net(x))


def test_a_loaded_adapter_shares_too(tmp_path: Path, calls: list[int]) -> None:
    net = adapted("peft")
    net.save_pretrained(str(tmp_path))  # type: ignore[operator]
    torch.manual_seed(0)
    loaded = kf.load_kore_model(Net(), tmp_path, is_trainable=True)
    same(loaded)
    assert calls == [3, 2] * 2
    x = torch.randn(4, 16)
    torch.testing.assert_close(loaded(x), net(x))


def test_compiled_whole(calls: list[int]) -> None:
    net = adapted("plain")
    x = torch.randn(4, 16)
    torch.testing.assert_close(torch.compile(net, fullgraph=True, backend="aot_eager")(x), apart(net)(x))
    assert not calls
