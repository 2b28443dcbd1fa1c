"""A pytest plugin for PEFT's own tests: they build our LoRA layers where they would build PEFT's for `nn.Linear`.

It knows nothing of single tests. A test counts as one of a LoRA on a linear layer if it built such a layer.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import re
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftConfig
from peft.tuners.lora import Linear
from torch import nn

from kore_fast.modules import lora
from kore_fast.modules.adapter import freeze_lora_a
from kore_fast.modules.lora import KoreLoraLinear, use_kore_layers

counts = {"built": 0, "fused": 0}
results: dict[str, dict[str, Any]] = {}
HUB = "needs the model hub"
OF_THE_HUB = re.compile(r"[\w.-]+/[\w.-]+")
OFFLINE = re.compile(
    r"offline mode|OfflineMode|LocalEntryNotFound|couldn't connect|Couldn't reach|Can't load .* for|Hub is not reach"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """What each run of the suite is told."""
    group = parser.getgroup("peft suite")
    group.addoption("--kore-layers", action="store_true", help="our layers in the place of PEFT's")
    group.addoption("--freeze-a", action="store_true", help="freeze A of every LoRA on a linear layer when it is made")
    group.addoption("--only", help="a JSON file with the tests to run; default all of LoRA")
    group.addoption("--results", help="where to write what came of each test")


def pytest_configure(config: pytest.Config) -> None:
    """Change PEFT before its tests are imported."""
    _never_online()
    _count(Linear if not config.option.kore_layers else KoreLoraLinear)
    if config.option.kore_layers:
        _make_every_config_ours()
    if config.option.freeze_a:
        _freeze_a_when_made()


def _never_online() -> None:
    """PEFT's tests ask for each model of the hub by one context manager, and for models of their own by it too."""
    utilities = importlib.import_module("tests.testing_utils")

    @contextlib.contextmanager
    def offline(model_id: str) -> Iterator[None]:
        if OF_THE_HUB.fullmatch(model_id):
            pytest.skip(f"{HUB}: {model_id}")
        yield

    utilities.hub_online_once = offline


def _count(layer: type[Linear]) -> None:
    make, run = Linear.__init__, lora.frozen_lora

    def counted(self: Linear, *args: Any, **kwargs: Any) -> None:
        counts["built"] += type(self) is layer
        make(self, *args, **kwargs)

    def frozen_lora(*args: Any, **kwargs: Any) -> Any:
        counts["fused"] += 1
        return run(*args, **kwargs)

    Linear.__init__, lora.frozen_lora = counted, frozen_lora


def _make_every_config_ours() -> None:
    prepare = LoraConfig.__post_init__

    def prepared(self: LoraConfig) -> None:
        prepare(self)
        if type(self) is LoraConfig:
            use_kore_layers(self)

    LoraConfig.__post_init__ = prepared


def _freeze_a_when_made() -> None:
    """As `freeze_lora_a` does it for KORE's adapters; it needs help with PEFT's own layer before PEFT 0.20."""
    make, switch, enable = Linear.update_layer, Linear.set_adapter, Linear.enable_adapters

    def hold(self: Linear) -> None:
        if type(self) is Linear:
            for A in self.lora_A.values():
                if getattr(A, "is_held", False):
                    A.weight.requires_grad_(False)

    def update_layer(self: Linear, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        make(self, adapter_name, *args, **kwargs)
        plain = type(self) in (Linear, KoreLoraLinear) and type(self.get_base_layer()) is nn.Linear
        if plain and adapter_name in self.lora_A and type(self.lora_A[adapter_name]) is nn.Linear:
            self.lora_A[adapter_name].is_held = True  # an attribute goes into copies
            freeze_lora_a(self, adapter_name)

    def set_adapter(self: Linear, *args: Any, **kwargs: Any) -> None:
        switch(self, *args, **kwargs)
        hold(self)

    def enable_adapters(self: Linear, enabled: bool) -> None:
        enable(self, enabled)
        hold(self)

    Linear.update_layer, Linear.set_adapter, Linear.enable_adapters = update_layer, set_adapter, enable_adapters


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is parametrised with other methods' configurations only; skip what is given a model of the hub."""
    only = json.loads(Path(config.option.only).read_text(encoding="utf-8")) if config.option.only else None
    wanted = [item for item in items if (item.nodeid in only if only is not None else _may_be_lora(item))]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(wanted)])
    items[:] = wanted
    for item in items:
        callspec = getattr(item, "callspec", None)
        for value in callspec.params.values() if callspec else ():
            if isinstance(value, str) and OF_THE_HUB.fullmatch(value):
                item.add_marker(pytest.mark.skip(reason=f"{HUB}: {value}"))


def _may_be_lora(item: pytest.Item) -> bool:
    callspec = getattr(item, "callspec", None)
    given = list(callspec.params.values()) if callspec else []
    kinds = {value if isinstance(value, type) else type(value) for value in given}
    configs = {kind for kind in kinds if issubclass(kind, PeftConfig)}
    return not configs or LoraConfig in configs


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Say with each report what was built and run so far, and whether a failure comes of the missing hub."""
    report = yield
    report.user_properties.append(("counts", dict(counts)))
    error = call.excinfo.value if call.excinfo else None
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        error = error.__cause__ or error.__context__
    report.user_properties.append(("offline", any(OFFLINE.search(f"{type(e).__name__}: {e}") for e in seen)))
    if report.when == "teardown":
        counts.update(built=0, fused=0)
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Gather; with several processes this runs in the first."""
    found = results.setdefault(report.nodeid, {"outcome": "passed", "offline": False, "why": ""})
    said = dict(report.user_properties)
    found.update(said["counts"])
    if report.outcome != "passed":
        crash = getattr(report.longrepr, "reprcrash", None)
        why = crash.message if crash else str(report.longrepr)
        found.update(outcome=report.outcome, offline=said["offline"] or HUB in why, why=why[:400])


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """A file that cannot be imported is a result too."""
    if report.failed:
        results[report.nodeid] = {"outcome": "not collected", "offline": False, "why": str(report.longrepr)[-400:]}


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write what came of each test."""
    if not hasattr(session.config, "workerinput"):
        Path(session.config.option.results).write_text(json.dumps(results, indent=1), encoding="utf-8")
