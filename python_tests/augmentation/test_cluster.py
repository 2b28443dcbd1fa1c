"""The augmentation over Ray: the folders that a local run writes, byte by byte, also when a worker is killed."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from kore_fast.augmentation.cluster import Cluster, RayOptions
from kore_fast.augmentation.pipeline import produce
from kore_fast.augmentation.plan import AugmentationPlan
from kore_fast.errors import DataError, LanguageModelError

HAS_RAY = importlib.util.find_spec("ray") is not None
needs_ray = pytest.mark.skipif(not HAS_RAY, reason='needs ray: pip install "kore-fast[ray]"')
TWO = {"workers": 2, "cpus_per_worker": 0.5}
SECRET = "sk-secret-0123456789abcdef"
TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


def test_options_refuse_a_ray_client() -> None:
    with pytest.raises(ValidationError, match="run the command on a machine of the cluster"):
        RayOptions(address="ray://head:10001")


def test_without_ray_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DataError, match=r'pip install "kore-fast\[ray\]"'), Cluster(RayOptions()):
        pass


@needs_ray
def test_an_address_where_nobody_listens_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        begun = time.monotonic()
        with pytest.raises(DataError, match=rf"Ray at {address}: nobody answers there.*'ray.address'"):
            Cluster(RayOptions(address=address)).__enter__()
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(DataError, match=f"Ray at {address}"):
            Cluster(RayOptions()).__enter__()
    assert time.monotonic() - begun < 60


@pytest.fixture(scope="module")
def ray_here() -> Iterator[Any]:
    """A Ray of two CPUs, whose workers have the key in their environment as a user's would."""
    ray = pytest.importorskip("ray", reason='needs ray: pip install "kore-fast[ray]"')
    os.environ["KORE_TEST_KEY"] = SECRET
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()
    del os.environ["KORE_TEST_KEY"]


def draw(seed: int) -> bytes:
    """A picture unlike those of other seeds."""
    rng = np.random.default_rng(seed)
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (8, 9, 3), dtype=np.uint8)).resize((90, 80)).save(file, "PNG")
    return file.getvalue()


def put(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(draw(seed))


def items_file(folder: Path, count: int = 7) -> Path:
    rows = []
    for n in range(count):
        put(folder / "images" / f"{n}.png", n)
        rows.append(
            {
                "id": f"i{n}",
                "name": f"Gor{n}",
                "type": "creature",
                "image": f"images/{n}.png",
                "text": f"The Gor{n} sings at dawn. It is {n}.",
            }
        )
    # The same text and name once more: its requests are partly those of another item.
    put(folder / "images" / "again.png", 99)
    rows.append({**rows[0], "id": "again", "image": "images/again.png"})
    path = folder / "items.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def commons(web: Any) -> None:
    """Play Commons: six pictures for a query, of which one is the same for all, one is gone, and one no picture."""

    def answer(handler: Any) -> None:
        asked = parse_qs(urlsplit(handler.path).query)["gsrsearch"][0]
        seed = sum(map(ord, asked))
        pages = []
        for place in range(6):
            path = f"/p/{0 if place == 1 else seed}-{place}.png"
            if place == 3:
                web.put(path, b"<html>no</html>", "text/html")
            elif place != 4:
                web.put(path, draw(100_000 + place * 10_000 + (0 if place == 1 else seed)))
            info = {"url": web.url + path, "width": 90, "height": 80, "mime": "image/png", "extmetadata": {}}
            pages.append({"title": f"File:{place}.png", "index": place + 1, "imageinfo": [info]})
        handler.reply_json({"query": {"pages": pages}})

    web.route("/api", answer)


@pytest.fixture
def web() -> Iterator[Any]:
    from python_tests.augmentation.images.conftest import Web

    made = Web()
    yield made
    made.server.shutdown()
    made.server.server_close()


def model(server: Any, **changes: Any) -> dict[str, Any]:
    return {
        "model": "m", "base_url": server.url, "api_key_env": "KORE_TEST_KEY", "backoff": 0.01, "timeout": 20.0,
        "concurrency": 8, **changes,
    }  # fmt: skip


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same_files(one: Path, other: Path) -> None:
    left, right = files(one), files(other)
    assert left.keys() == right.keys()
    assert [name for name in left if left[name] != right[name]] == []


def exported(cache: Path) -> list[dict[str, Any]]:
    from kore_fast.augmentation.language import RequestCache

    with RequestCache(cache / "requests.sqlite") as requests:
        return list(requests.rows())


@needs_ray
@pytest.mark.slow
def test_model_search_and_clip_give_the_folder_of_a_local_run(tmp_path: Path, web: Any, ray_here: Any) -> None:
    pytest.importorskip("openai", reason='needs openai: pip install "kore-fast[augment]"')
    from python_tests.augmentation.language.server import Reply, Server, task_of

    def script(body: dict[str, Any], times: int) -> Any:
        # Some requests fail once, some answers cannot be used once, some never.
        text = str(body["messages"])
        if "Gor3" in text and task_of(body) == "summary":
            return Reply(content="{}")
        if "Gor2" in text and times == 0:
            return Reply(status=500)
        if "Gor1" in text and task_of(body) == "answer" and len(body["messages"]) == 2:
            return Reply(content='{"answer": ""}') if "fact 2" in text else Reply()
        return Reply()

    items = items_file(tmp_path / "set")
    commons(web)
    search = {
        "provider": "wikimedia", "contact": "test@example.org", "endpoint": f"{web.url}/api", "per_host": 4,
        "requests_per_minute": 60_000, "backoff": 0, "allow_private_addresses": True,
    }  # fmt: skip
    clip: dict[str, Any] = {"unfiltered": True}
    if importlib.util.find_spec("open_clip") is not None:
        clip = {"model": f"local-dir:{tiny_clip(tmp_path / 'clip')}", "device": "cpu", "batch_size": 4}
    made = {}
    for name, ray in (("local", None), ("ray", TWO)):
        with Server(script) as server:
            plan = AugmentationPlan.model_validate(
                {
                    "language_model": model(server),
                    "image_search": search,
                    "clip": clip,
                    "grounding": {"judge": "all"},
                    "ray": ray,
                }
            )
            produce(items, plan, tmp_path / name, tmp_path / f"{name}-cache")
            made[name] = len(server.requests)
            again = web.paths()
            produce(items, plan, tmp_path / f"{name}-again", tmp_path / f"{name}-cache")
            assert len(server.requests) == made[name]
            # What is gone for good is not asked for again.
            assert len(web.paths()) == len(again)
    same_files(tmp_path / "local", tmp_path / "ray")
    same_files(tmp_path / "ray", tmp_path / "ray-again")
    assert made["ray"] == made["local"]
    assert exported(tmp_path / "ray-cache") == exported(tmp_path / "local-cache")
    pictures = {path for path in files(tmp_path / "ray-cache" / "pictures") if path.endswith(".png")}
    assert pictures == {path for path in files(tmp_path / "local-cache" / "pictures") if path.endswith(".png")}
    assert len(pictures) > 20
    summary = json.loads((tmp_path / "ray" / "summary.json").read_text())
    assert summary["pictures"]["recognition: found"] > 0
    assert any("summary" in reason for reason in summary["writer"]["unusable_answers"])
    assert summary["judge"]["cases"] > 0
    assert summary["judge"]["not_judged"] == 0
    key_is_in_no_file(ray_here)


def tiny_clip(folder: Path) -> Path:
    """Random weights in a small architecture."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    (folder / "tiny-clip.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(folder / "tiny-clip.json")
    torch.manual_seed(0)
    weights = open_clip.create_model("tiny-clip").state_dict()
    (folder / "tiny-clip.json").unlink()
    save_file(weights, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY, "preprocess_cfg": {}}))
    return folder


def key_is_in_no_file(ray: Any) -> None:
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    read = 0
    for path in session.rglob("*"):
        if path.is_file() and not path.is_symlink():
            read += 1
            assert SECRET.encode() not in path.read_bytes(), path
    assert read > 5


@needs_ray
@pytest.mark.slow
def test_a_worker_that_is_killed_costs_only_what_it_had_in_hand(tmp_path: Path, ray_here: Any) -> None:
    pytest.importorskip("openai", reason='needs openai: pip install "kore-fast[augment]"')
    from python_tests.augmentation.language.server import Reply, Server, task_of

    killed: list[int] = []

    def script(body: dict[str, Any], times: int) -> Any:
        if len(server.requests) > 60 and not killed and task_of(body) == "summary":
            killed.append(kill_one_worker())
        return Reply(delay=0.02)

    items = items_file(tmp_path / "set", 24)
    with Server(script) as server:
        plan = AugmentationPlan.model_validate({"language_model": model(server, concurrency=4), "ray": TWO})
        produce(items, plan, tmp_path / "ray", tmp_path / "ray-cache")
        assert killed
        sent = len(server.requests)
    with Server() as server:
        plan = AugmentationPlan.model_validate({"language_model": model(server)})
        produce(items, plan, tmp_path / "local", tmp_path / "local-cache")
        assert sent > len(server.requests)
        # The worker held at most two items at once, and those that were finished and not yet handed over.
        assert sent - len(server.requests) < len(server.requests) // 2
    same_files(tmp_path / "local", tmp_path / "ray")
    assert exported(tmp_path / "ray-cache") == exported(tmp_path / "local-cache")


def kill_one_worker() -> int:
    """Kill one of the workers that were started from here; other processes are left alone."""
    own = os.getpid()
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            said = (process / "cmdline").read_bytes().decode(errors="replace")
            parents = ancestors(int(process.name))
        except OSError:
            continue
        if "MapWorker" in said and own in parents:
            os.kill(int(process.name), signal.SIGKILL)
            return int(process.name)
    raise AssertionError("no worker of this Ray is there")


def ancestors(pid: int) -> set[int]:
    found: set[int] = set()
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        found.add(pid)
    return found


@needs_ray
def test_an_error_of_a_worker_is_the_users_error_without_the_key(tmp_path: Path, ray_here: Any) -> None:
    pytest.importorskip("openai", reason='needs openai: pip install "kore-fast[augment]"')
    from python_tests.augmentation.language.server import Server, error

    with Server(lambda body, times: error(401, f"wrong key {SECRET}")) as server:
        plan = AugmentationPlan.model_validate({"language_model": model(server), "ray": TWO})
        with pytest.raises(LanguageModelError, match="check the key in KORE_TEST_KEY") as raised:
            produce(items_file(tmp_path / "set"), plan, tmp_path / "out", tmp_path / "cache")
    assert SECRET not in str(raised.value)
    key_is_in_no_file(ray_here)


@needs_ray
def test_a_folder_of_pictures_is_searched_here(tmp_path: Path, ray_here: Any) -> None:
    items = items_file(tmp_path / "set")
    for n in range(7):
        put(tmp_path / "library" / f"Gor{n}.png", 200 + n)
    given = {"image_search": {"folder": str(tmp_path / "library")}, "clip": {"unfiltered": True}}
    for name, ray in (("local", None), ("ray", TWO)):
        plan = AugmentationPlan.model_validate({**given, "ray": ray})
        produce(items, plan, tmp_path / name, tmp_path / f"{name}-cache")
    same_files(tmp_path / "local", tmp_path / "ray")
