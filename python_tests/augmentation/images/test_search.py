from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from kore_fast.augmentation.images import ImageSearchOptions, Picture, PictureSearch
from kore_fast.errors import DataError

pytest.importorskip("httpx2")

FAST: dict[str, Any] = {"allow_private_addresses": True, "backoff": 0.01, "requests_per_minute": 60_000, "timeout": 5.0}


class Service:
    """An Openverse on loopback: what each query finds, as addresses or whole rows."""

    def __init__(self, web: Any) -> None:
        self.web = web
        self.finds: dict[str, list[Any]] = {}
        web.route("/api", self.answer)

    def answer(self, handler: Any) -> None:
        found = self.finds.get(handler.query()["q"], [])
        rows = [
            {"url": one, "license": "by", "license_version": "4.0"} if isinstance(one, str) else one for one in found
        ]
        handler.reply_json({"results": rows[: int(handler.query()["page_size"])]})

    def search(self, cache: Path, **options: Any) -> PictureSearch:
        values = {**FAST, "provider": "openverse", "endpoint": self.web.url + "/api", **options}
        return PictureSearch(ImageSearchOptions(**values), cache)


@pytest.fixture
def service(web: Any) -> Service:
    return Service(web)


def prepare(search: PictureSearch, *queries: str) -> None:
    asyncio.run(search.prepare(queries))


def names(pictures: list[Picture]) -> list[str]:
    return [picture.url.rsplit("/", 1)[1] for picture in pictures]


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_pictures_come_in_the_order_of_the_search_with_their_origin(
    service: Service, tmp_path: Path, make: Any
) -> None:
    web = service.web
    service.finds["red fox"] = [
        {
            "url": web.put(f"/{number}.jpg", make.encode(make.draw(number), "PNG")),
            "title": f"Fox {number}",
            "foreign_landing_url": f"https://flickr.example/{number}",
            "creator": "Jane",
            "license": "by-sa",
            "license_version": "2.0",
            "license_url": "https://creativecommons.org/licenses/by-sa/2.0/",
        }
        for number in (3, 1, 2)
    ]
    search = service.search(tmp_path, results=2)
    prepare(search, "red  fox", "nothing")
    first, second = search.candidates(" red fox ")
    assert names([first, second]) == ["3.jpg", "1.jpg"]
    assert first.query == "red fox"
    assert (first.provider, first.author, first.licence) == ("openverse", "Jane", "CC BY-SA 2.0")
    assert first.licence_url == "https://creativecommons.org/licenses/by-sa/2.0/"
    assert (first.source_page, first.title) == ("https://flickr.example/3", "Fox 3")
    assert (first.width, first.height, first.format) == (96, 80, "PNG")
    # A PNG that is called .jpg is kept as it is, under its own name; the third was not needed.
    assert first.file.endswith(f"{first.sha256}.png")
    assert search.path(first).read_bytes() == make.encode(make.draw(3), "PNG")
    assert "/2.jpg" not in web.paths()
    beside = json.loads((tmp_path / first.file).with_suffix(".json").read_text())
    assert beside == first.model_dump(exclude_none=True)
    assert search.candidates("nothing") == search.candidates("  ") == []


def test_a_second_run_asks_nothing_and_the_cache_alone_answers(service: Service, tmp_path: Path, make: Any) -> None:
    web = service.web
    service.finds["fox"] = [web.put("/1.png", make.encode(make.draw(1))), web.url + "/gone.png"]
    search = service.search(tmp_path)
    prepare(search, "fox", "fox", "nothing")
    assert Counter(web.paths()) == {"/api": 2, "/1.png": 1, "/gone.png": 1}
    web.forget()
    before, candidates = files(tmp_path), search.candidates("fox")
    prepare(service.search(tmp_path), "nothing", "fox")
    assert web.asked == []
    assert files(tmp_path) == before
    web.server.shutdown()
    web.server.server_close()
    assert service.search(tmp_path).candidates("fox") == candidates
    with pytest.raises(DataError, match="nothing is known of the query 'wolf'"):
        search.candidates("wolf")
    # Other options are another question.
    with pytest.raises(DataError, match="with the same options"):
        service.search(tmp_path, licences=["by"]).candidates("fox")


def test_what_cannot_be_used_is_told_and_replaced(service: Service, tmp_path: Path, make: Any) -> None:
    web = service.web
    jpeg = make.encode(make.draw(1, (300, 300)), "JPEG")
    expected = {
        web.put("/page.jpg", b"<!doctype html><p>gone</p>", "image/jpeg"): "web page",
        web.put("/drawing.svg", b'<svg><image href="http://169.254.169.254/"/></svg>', "image/svg+xml"): "SVG",
        web.put("/giga.png", make.png_header(200_000, 100_000)): "pixels",
        web.put("/cut.jpg", jpeg[:4000], "image/jpeg"): "cut short",
        web.put("/icon.png", make.encode(make.draw(1, (32, 32)))): "32 x 32 pixels",
        web.put("/long.png", b"x" * 200_001): "announces 200,001 bytes",
        web.url + "/gone.png": "answered 404",
        web.put("/away.png", b"", status=302, Location="file:///etc/passwd"): "only http and https",
    }
    good = [web.put(f"/{number}.png", make.encode(make.draw(number))) for number in (4, 5, 6)]
    service.finds["fox"] = [*expected, *good]
    search = service.search(tmp_path, results=2, spare=18, max_bytes=200_000)
    prepare(search, "fox")
    assert names(search.candidates("fox")) == ["4.png", "5.png"]
    assert "/6.png" not in web.paths()
    reports = list(search.reports(["fox"]))
    assert [report.url for report in reports] == list(expected)
    for report, reason in zip(reports, expected.values(), strict=True):
        assert reason in report.reason
        assert not report.again
    web.forget()
    prepare(search, "fox")
    assert web.asked == []
    # Under wider bounds, what was refused for them is tried once more; what is kept still counts.
    wider = service.search(tmp_path, results=2, spare=18, max_bytes=300_000)
    web.put("/long.png", make.encode(make.draw(9)) + b"\0" * 200_000)
    prepare(wider, "fox")
    assert names(wider.candidates("fox")) == ["long.png", "4.png"]
    assert names(search.candidates("fox")) == ["4.png", "5.png"]


def test_private_addresses_are_refused_by_default(service: Service, tmp_path: Path, make: Any) -> None:
    web = service.web
    service.finds["fox"] = [web.put("/1.png", make.encode(make.draw(1))), "http://169.254.169.254/latest/meta-data/"]
    search = service.search(tmp_path, allow_private_addresses=False)
    prepare(search, "fox")
    assert search.candidates("fox") == []
    assert [report.reason for report in search.reports(["fox"])] == [
        "the host 127.0.0.1 is refused: 127.0.0.1 is not a public address",
        "the host 169.254.169.254 is refused: 169.254.169.254 is not a public address",
    ]
    assert web.paths() == ["/api"]


def test_the_same_picture_counts_once(service: Service, tmp_path: Path, make: Any) -> None:
    web = service.web
    same = make.encode(make.draw(1))
    smaller = make.encode(make.draw(1).resize((80, 67)), "JPEG", quality=90)
    service.finds["fox"] = [
        web.put("/a.png", same),
        web.put("/b.png", same),
        web.put("/c.jpg", smaller),
        web.put("/d.png", make.encode(make.draw(2))),
    ]
    service.finds["wolf"] = [web.url + "/d.png", web.put("/e.png", same)]
    search = service.search(tmp_path)
    prepare(search, "fox", "wolf")
    assert names(search.candidates("fox")) == ["a.png", "d.png"]
    assert [report.reason for report in search.reports(["fox"])] == [
        f"it is the same file as {web.url}/a.png",
        f"it looks the same as {web.url}/a.png",
    ]
    assert Counter(web.paths())["/d.png"] == 1
    assert len(list(tmp_path.glob("pictures/*/*.png"))) == 2
    # What was found first does not show in what another query says of the same picture.
    assert search.candidates("wolf")[1].url == web.url + "/e.png"
    assert search.candidates("wolf")[1].sha256 == search.candidates("fox")[0].sha256


def test_the_items_own_picture_is_no_candidate(service: Service, tmp_path: Path, make: Any) -> None:
    web = service.web
    own = tmp_path / "own.png"
    own.write_bytes(make.encode(make.draw(1)))
    smaller = make.encode(make.draw(1).resize((80, 67)), "JPEG", quality=90)
    service.finds["fox"] = [web.put("/1.jpg", smaller), web.put("/2.png", make.encode(make.draw(2)))]
    search = service.search(tmp_path / "cache")
    prepare(search, "fox")
    assert names(search.candidates("fox")) == ["1.jpg", "2.png"]
    assert names(search.candidates("fox", own=own)) == ["2.png"]
    own.write_bytes(make.encode(make.draw(2)))
    assert names(search.candidates("fox", own=own)) == ["1.jpg"]
    with pytest.raises(DataError, match="correct the item's picture"):
        search.candidates("fox", own=tmp_path / "missing.png")


def test_only_allowed_licences(service: Service, tmp_path: Path, make: Any) -> None:
    web = service.web
    for number in range(4):
        web.put(f"/{number}.png", make.encode(make.draw(number + 1)))
    licences = ["by-nc", "by", "", "cc0"]
    service.finds["fox"] = [
        {"url": f"{web.url}/{number}.png", "license": licence} for number, licence in enumerate(licences)
    ]
    search = service.search(tmp_path, licences=["by", "cc0"])
    prepare(search, "fox")
    assert names(search.candidates("fox")) == ["1.png", "3.png"]
    assert [report.reason for report in search.reports(["fox"])] == [
        "its licence, CC BY-NC, is not allowed",
        "its licence, unknown, is not allowed",
    ]
    assert "/0.png" not in web.paths()


def in_turn(*answers: Any) -> Any:
    """Each request gets the next answer, and the last one from then on."""
    left, lock = list(answers), threading.Lock()

    def answer(handler: Any) -> None:
        with lock:
            current = left.pop(0) if len(left) > 1 else left[0]
        current(handler)

    return answer


def test_passing_faults_are_tried_again(service: Service, tmp_path: Path, make: Any) -> None:
    web = service.web
    picture = make.encode(make.draw(1))
    busy = in_turn(
        lambda handler: handler.reply(429, b"", Retry_After="1"),
        lambda handler: handler.reply(500, b""),
        lambda handler: handler.reply(200, picture),
    )
    service.finds["fox"] = [web.route("/busy.png", busy)]
    web.routes["/api"] = in_turn(lambda handler: handler.reply(503, b"", Retry_After="0"), service.answer)
    search = service.search(tmp_path)
    start = time.monotonic()
    prepare(search, "fox")
    assert names(search.candidates("fox")) == ["busy.png"]
    assert time.monotonic() - start >= 1
    assert Counter(web.paths()) == {"/api": 2, "/busy.png": 3}


def test_what_still_fails_is_left_for_the_next_run(service: Service, tmp_path: Path, make: Any) -> None:
    web = service.web
    service.finds["fox"] = [web.put("/1.png", b"", status=503), web.put("/2.png", make.encode(make.draw(2)))]
    service.finds["wolf"] = [web.url + "/1.png"]
    web.put("/3.png", b"", status=429, Retry_After="3600")
    service.finds["bear"] = [web.url + "/3.png"]
    search = service.search(tmp_path, results=1, retries=2, concurrency=1)
    prepare(search, "fox", "wolf", "bear")
    # An address that failed is not tried for another query of the same run; an hour's wait is not waited for.
    assert Counter(web.paths()) == {"/api": 3, "/1.png": 3, "/2.png": 1, "/3.png": 1}
    assert names(search.candidates("fox")) == ["2.png"]
    fox, _, bear = search.reports(["fox", "wolf", "bear"])
    assert (fox.reason, fox.again) == ("127.0.0.1 answered 503", True)
    assert bear.reason == "127.0.0.1 answered 429, and asks to wait 3600 s"
    web.forget()
    web.put("/1.png", make.encode(make.draw(1)))
    prepare(search, "fox", "wolf", "bear")
    assert Counter(web.paths()) == {"/1.png": 1, "/3.png": 1}
    assert names(search.candidates("fox")) == ["1.png"]


def test_searches_that_fail_in_a_row_stop_the_run_and_one_does_not(service: Service, tmp_path: Path, make: Any) -> None:
    web = service.web
    service.finds["fox"] = [web.put("/1.png", make.encode(make.draw(1)))]

    def answer(handler: Any) -> None:
        if handler.query()["q"].startswith("bad"):
            handler.reply(400, b'{"detail": "no"}', "application/json")
        else:
            service.answer(handler)

    web.route("/api", answer)
    search = service.search(tmp_path, concurrency=1)
    prepare(search, *[f"bad {number}" for number in range(4)], "fox", "bad 5")
    assert names(search.candidates("fox")) == ["1.png"]
    assert search.candidates("bad 1") == []
    (report,) = search.reports(["bad 1"])
    assert report.url is None
    assert "answered 400" in report.reason
    with pytest.raises(DataError, match=r"5 searches in a row failed, the last, for 'bad 4'.*finished work is kept"):
        prepare(search, *[f"bad {number}" for number in range(100)])
    assert len(web.asked) < 20


def test_a_refused_key_stops_the_run_at_once_and_what_was_done_is_kept(
    service: Service, tmp_path: Path, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    web = service.web
    service.finds["fox"] = [web.put("/1.png", make.encode(make.draw(1)))]
    monkeypatch.setenv("OPENVERSE_TOKEN", "expired")
    search = service.search(tmp_path, concurrency=1)
    prepare(search, "fox")
    web.put("/api", b"{}", status=401)
    web.forget()
    with pytest.raises(DataError, match="OPENVERSE_TOKEN"):
        prepare(search, "fox", *[f"wolf {number}" for number in range(50)])
    assert web.paths() == ["/api"]
    assert names(search.candidates("fox")) == ["1.png"]


def test_no_key_in_cache_logs_or_errors(
    web: Any, tmp_path: Path, make: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    key = "sekret+/1"
    monkeypatch.setenv("SERPAPI_API_KEY", key)
    caplog.set_level(logging.DEBUG)
    good = {"original": web.put("/1.png", make.encode(make.draw(1))), "title": f"Fox {key}", "link": f"https://x/{key}"}
    echo = {"original": f"{web.url}/echo.png?k=sekret%2B%2F1"}
    cut = {
        "original": web.put("/2.png", make.encode(make.draw(2))),
        "title": "x" * 296 + key,
        "source": "sekret&#43;/1",
    }

    def answer(handler: Any) -> None:
        if handler.query()["q"] == "fox":
            handler.reply_json({"images_results": [good, echo, cut], "search_metadata": {"url": handler.path}})
        elif handler.query()["q"] == "wolf":
            handler.reply_json({"error": f"no more searches for {key}"})
        else:
            told = f"<p>wrong key in {handler.path}, <i>sekret&#43;/1</i>" + " " * 1900 + key * 40
            handler.reply(401, told.encode(), "text/html")

    web.route("/api", answer)
    options = ImageSearchOptions(**FAST, provider="serpapi", endpoint=web.url + "/api")
    search = PictureSearch(options, tmp_path)
    prepare(search, "fox", "wolf")
    assert names(search.candidates("fox")) == ["1.png", "2.png"]
    assert search.candidates("fox")[0].title == "Fox ***"
    with pytest.raises(DataError) as caught:
        prepare(search, "bear")
    said = [str(caught.value), caplog.text, repr(search.options), str(list(search.reports(["fox", "wolf"])))]
    said += [path + content.decode("latin-1") for path, content in files(tmp_path).items()]
    assert caplog.text  # the client does log, at this level
    assert "/api" in str(web.asked)
    assert not [text for text in said if "sek" in text]
    assert "/echo.png" not in web.paths()
    assert "***" in str(caught.value)


SCRIPT = """
import asyncio, json, sys
from kore_fast.augmentation.images import ImageSearchOptions, PictureSearch
search = PictureSearch(ImageSearchOptions(**json.loads(sys.argv[1])), sys.argv[2])
asyncio.run(search.prepare(json.loads(sys.argv[3])))
"""


def start(service: Service, cache: Path, queries: list[str]) -> subprocess.Popen[bytes]:
    values = {**FAST, "provider": "openverse", "endpoint": service.web.url + "/api", "concurrency": 4}
    command = [sys.executable, "-c", SCRIPT, json.dumps(values), str(cache), json.dumps(queries)]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])})


def many(service: Service, make: Any, delay: float = 0.0) -> list[str]:
    queries = [f"query {number}" for number in range(12)]
    for number, query in enumerate(queries):
        service.finds[query] = []
        for place in range(3):
            picture = make.encode(make.draw(3 * number + place + 1))

            def answer(handler: Any, picture: bytes = picture) -> None:
                time.sleep(delay)
                handler.reply(200, picture)

            service.finds[query].append(service.web.route(f"/{number}-{place}.png", answer))
    return queries


def test_after_kill_9_only_what_is_missing_is_asked_for(service: Service, tmp_path: Path, make: Any) -> None:
    web = service.web
    queries = many(service, make, delay=0.03)
    process = start(service, tmp_path / "killed", queries)
    deadline = time.monotonic() + 60
    while len(web.asked) < 20 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 20 <= len(web.asked) < 48
    search = service.search(tmp_path / "killed")
    prepare(search, *queries)
    asked = Counter(path for path, _ in web.asked)
    assert len(asked) == 12 + 36
    # Asked twice: what was under way when the process died, at most two downloads from this host and four searches.
    assert sum(asked.values()) - len(asked) <= 6
    whole = service.search(tmp_path / "whole")
    prepare(whole, *queries)
    for query in queries:
        assert search.candidates(query) == whole.candidates(query)
        assert len(whole.candidates(query)) == 3


def test_processes_may_share_a_cache(service: Service, tmp_path: Path, make: Any) -> None:
    queries = many(service, make)
    processes = [start(service, tmp_path / "shared", queries) for _ in range(3)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    service.web.forget()
    search = service.search(tmp_path / "shared")
    prepare(search, *queries)
    assert service.web.asked == []
    assert all(len(search.candidates(query)) == 3 for query in queries)
    assert not list((tmp_path / "shared").rglob("*.partial"))


def test_queries_are_read_as_places_become_free(service: Service, tmp_path: Path) -> None:
    ahead = []

    def queries() -> Any:
        for number in range(40):
            ahead.append(number - len(service.web.asked))
            yield f"query {number}"

    asyncio.run(service.search(tmp_path, concurrency=3).prepare(queries()))
    assert len(service.web.asked) == 40
    assert max(ahead) <= 3


def test_searches_keep_their_distance(service: Service, tmp_path: Path) -> None:
    start = time.monotonic()
    prepare(service.search(tmp_path, requests_per_minute=600), *[f"query {number}" for number in range(6)])
    assert time.monotonic() - start >= 0.5


def test_a_picture_lost_from_the_cache_is_fetched_again(service: Service, tmp_path: Path, make: Any) -> None:
    service.finds["fox"] = [service.web.put("/1.png", make.encode(make.draw(1)))]
    search = service.search(tmp_path)
    prepare(search, "fox")
    search.path(search.candidates("fox")[0]).unlink()
    assert search.candidates("fox") == []
    prepare(search, "fox")
    assert len(search.candidates("fox")) == 1


def test_a_broken_record_and_a_full_disk_name_the_file(service: Service, tmp_path: Path, make: Any) -> None:
    service.finds["fox"] = [service.web.put("/1.png", make.encode(make.draw(1)))]
    search = service.search(tmp_path / "cache")
    prepare(search, "fox")
    (record,) = (tmp_path / "cache").glob("searches/*/*.json")
    record.write_text("{")
    with pytest.raises(DataError, match=r"searches/.*remove it"):
        search.candidates("fox")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"could not be written"):
        prepare(service.search(tmp_path / "file"), "fox")
    # A disk that is full while a picture is kept is not the picture's fault.
    full = tmp_path / "full"
    full.mkdir()
    (full / "pictures").write_text("")
    with pytest.raises(DataError, match=r"pictures/.*could not be written"):
        prepare(service.search(full), "fox")
    assert not list(full.glob("downloads/*/*"))


def test_what_killed_processes_left_long_ago_is_removed(service: Service, tmp_path: Path) -> None:
    room = tmp_path / "pictures" / "ab"
    room.mkdir(parents=True)
    old, new = room / ".x.png.1.partial", room / ".x.png.2.partial"
    for path in (old, new):
        path.write_bytes(b"x")
    os.utime(old, (0, 0))
    prepare(service.search(tmp_path), "fox")
    assert not old.exists()
    assert new.exists()


def test_a_local_folder_is_searched_offline_and_follows_its_changes(tmp_path: Path, make: Any) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, name in enumerate(["red fox.png", "fox cub.png", "wolf.png"], start=1):
        make.draw(number).save(folder / name)
    (folder / "old fox.png").write_bytes(b"no picture")
    options = ImageSearchOptions(folder=str(folder))
    search = PictureSearch(options, tmp_path / "cache")
    prepare(search, "fox")
    assert [picture.url for picture in search.candidates("fox")] == ["fox cub.png", "red fox.png"]
    (report,) = search.reports(["fox"])
    assert report.url == "old fox.png"
    assert "not a picture" in report.reason
    make.draw(4).save(folder / "old fox.png")
    changed = PictureSearch(options, tmp_path / "cache")
    prepare(changed, "fox")
    assert [picture.url for picture in changed.candidates("fox")] == ["fox cub.png", "old fox.png", "red fox.png"]


def test_without_the_client_a_local_folder_works_and_the_web_says_what_to_install(tmp_path: Path, make: Any) -> None:
    make.draw(1).save(tmp_path / "fox.png")
    code = """
import asyncio, sys
sys.modules["httpx2"] = sys.modules["httpcore2"] = None
from kore_fast.augmentation.images import ImageSearchOptions, PictureSearch
from kore_fast.errors import DataError
search = PictureSearch(ImageSearchOptions(folder=sys.argv[1]), sys.argv[1] + "/cache")
asyncio.run(search.prepare(["fox"]))
assert len(search.candidates("fox")) == 1
try:
    asyncio.run(PictureSearch(ImageSearchOptions(provider="openverse"), sys.argv[1] + "/cache").prepare(["fox"]))
except DataError as error:
    assert 'pip install "kore-fast[augment]"' in str(error)
else:
    raise SystemExit("no error")
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
