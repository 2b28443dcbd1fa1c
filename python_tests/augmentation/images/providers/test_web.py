"""Each search service as its documentation describes it, played by a server on loopback."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from kore_fast.augmentation.images import Found, ImageSearchOptions
from kore_fast.augmentation.images.fetch import Unavailable
from kore_fast.augmentation.images.providers import make_provider
from kore_fast.errors import DataError

pytest.importorskip("httpx2")

KEY = "sekret+/key=1"


def search(web: Any, provider: str, query: str = "Ada Lovelace", count: int = 3, **options: Any) -> list[Found]:
    values = {"contact": "test@example.org", "endpoint": web.url + "/api", "allow_private_addresses": True, **options}

    async def run() -> list[Found]:
        async with make_provider(ImageSearchOptions(provider=provider, **values)) as opened:
            return await opened.search(query, count)

    return asyncio.run(run())


def test_wikimedia(web: Any) -> None:
    def answer(handler: Any) -> None:
        def page(index: int, **info: Any) -> dict[str, Any]:
            return {
                "pageid": 9 - index,
                "ns": 6,
                "title": f"File:Number {index}.jpg",
                "index": index,
                "imageinfo": [info],
            }

        about = {
            "LicenseShortName": {"value": "CC BY-SA 4.0", "source": "commons-desc-page"},
            "LicenseUrl": {"value": "https://creativecommons.org/licenses/by-sa/4.0"},
            "Artist": {"value": '<a href="//commons.wikimedia.org/wiki/User:Jane">Jane</a>'},
            "ObjectName": {"value": "Ada"},
        }
        second = page(2, url="https://up.example/2.jpg", width=10, height=20, mime="image/jpeg", extmetadata=[])
        first = page(
            1,
            url="https://up.example/1.jpg",
            thumburl="https://up.example/thumb/1.jpg",
            thumbwidth=960,
            thumbheight=640,
            width=6000,
            height=4000,
            descriptionurl="https://commons.example/File:1.jpg",
            mime="image/jpeg",
            extmetadata=about,
        )
        broken = {"pageid": 1, "title": "File:Broken.jpg", "index": 3}
        handler.reply_json({"batchcomplete": True, "query": {"pages": [broken, second, first, "odd"]}})

    web.route("/api", answer)
    first, second = search(web, "wikimedia")
    assert first == Found(
        url="https://up.example/thumb/1.jpg",
        source_page="https://commons.example/File:1.jpg",
        title="Ada",
        author="Jane",
        licence="CC BY-SA 4.0",
        licence_url="https://creativecommons.org/licenses/by-sa/4.0",
        width=960,
        height=640,
        mime="image/jpeg",
    )
    assert (second.url, second.title, second.licence) == ("https://up.example/2.jpg", "Number 2.jpg", None)
    assert search(web, "wikimedia", width=None)[0].url == "https://up.example/1.jpg"
    path, headers = web.asked[0]
    assert headers["User-Agent"].startswith("kore-fast/")
    assert "(test@example.org)" in headers["User-Agent"]
    for part in ("generator=search", "gsrsearch=Ada+Lovelace+filetype%3Abitmap", "gsrnamespace=6", "gsrlimit=3"):
        assert part in path
    assert "iiurlwidth=960" in path
    assert "iiurlwidth" not in web.asked[1][0]


def test_wikimedia_that_is_behind_is_asked_later_and_without_results_is_empty(web: Any) -> None:
    web.route("/api", lambda handler: handler.reply_json({"error": {"code": "maxlag", "info": "Waiting: 7 s lagged"}}))
    with pytest.raises(Unavailable, match="7 s lagged"):
        search(web, "wikimedia")
    web.route("/api", lambda handler: handler.reply_json({"batchcomplete": True}))
    assert search(web, "wikimedia") == []
    web.put("/api", b"blocked: no contact", "text/plain", status=403)
    with pytest.raises(DataError, match=r"answered 403 \(blocked: no contact\) to the contact 'test@example.org'"):
        search(web, "wikimedia")


def openverse_row(number: int, **fields: Any) -> dict[str, Any]:
    return {
        "id": f"id-{number}",
        "title": f"Title {number}",
        "foreign_landing_url": f"https://flickr.example/{number}",
        "url": f"https://live.example/{number}.jpg",
        "creator": "Jane",
        "license": "by-sa",
        "license_version": "2.0",
        "license_url": "https://creativecommons.org/licenses/by-sa/2.0/",
        "filetype": "jpg",
        "width": 1024,
        "height": 768,
        **fields,
    }


def test_openverse(web: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [openverse_row(1), openverse_row(2, url=None), openverse_row(3, license="cc0", license_version="1.0")]
    web.route("/api", lambda handler: handler.reply_json({"result_count": 3, "page_size": 3, "results": rows}))
    first, third = search(web, "openverse", count=50, licences=["by-sa", "cc0"])
    assert first == Found(
        url="https://live.example/1.jpg",
        source_page="https://flickr.example/1",
        title="Title 1",
        author="Jane",
        licence="CC BY-SA 2.0",
        licence_url="https://creativecommons.org/licenses/by-sa/2.0/",
        width=1024,
        height=768,
        mime="image/jpeg",
    )
    assert third.licence == "CC0 1.0"
    path, headers = web.asked[0]
    assert "page_size=20" in path
    assert "license=by-sa%2Ccc0" in path
    assert "Authorization" not in headers
    monkeypatch.setenv("OPENVERSE_TOKEN", KEY)
    search(web, "openverse")
    assert web.asked[1][1]["Authorization"] == f"Bearer {KEY}"
    web.put("/api", b'{"detail": "expired"}', "application/json", status=401)
    with pytest.raises(DataError, match="OPENVERSE_TOKEN; tokens expire") as caught:
        search(web, "openverse")
    assert KEY not in str(caught.value)


def test_brave(web: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {
        "type": "image_result",
        "title": "Ada",
        "url": "https://page.example/ada",
        "source": "page.example",
        "thumbnail": {"src": "https://proxy.example/small.jpg"},
        "properties": {"url": "https://page.example/ada.jpg", "width": 800, "height": 600},
    }
    web.route(
        "/api", lambda handler: handler.reply_json({"type": "images", "results": [row, {**row, "properties": None}]})
    )
    monkeypatch.setenv("BRAVE_API_KEY", KEY)
    assert search(web, "brave") == [
        Found(
            url="https://page.example/ada.jpg",
            source_page="https://page.example/ada",
            title="Ada",
            width=800,
            height=600,
        )
    ]
    path, headers = web.asked[0]
    assert headers["X-Subscription-Token"] == KEY
    assert "sekret" not in path
    web.put("/api", b'{"error": {"code": "SUBSCRIPTION_TOKEN_INVALID"}}', "application/json", status=422)
    with pytest.raises(DataError, match="environment variable BRAVE_API_KEY"):
        search(web, "brave")
    web.put("/api", b'{"error": {"code": "VALIDATION"}}', "application/json", status=422)
    with pytest.raises(Unavailable, match="answered 422"):
        search(web, "brave")


def test_serpapi(web: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {
        "position": 1,
        "title": "Ada",
        "link": "https://page.example/ada",
        "source": "Page",
        "original": "https://page.example/ada.jpg",
        "original_width": 800,
        "original_height": 600,
        "license_details_url": "https://creativecommons.org/licenses/by/4.0/",
    }
    monkeypatch.setenv("MY_KEY", KEY)
    web.route("/api", lambda handler: handler.reply_json({"images_results": [row]}))
    assert search(web, "serpapi", key_env="MY_KEY", licences=["by"]) == [
        Found(
            url="https://page.example/ada.jpg",
            source_page="https://page.example/ada",
            title="Ada",
            author="Page",
            licence="CC BY",
            licence_url="https://creativecommons.org/licenses/by/4.0/",
            width=800,
            height=600,
        )
    ]
    assert "api_key=sekret%2B%2Fkey%3D1" in web.asked[0][0]
    assert "licenses=cl" in web.asked[0][0]
    none = "Google hasn't returned any results for this query."
    web.route("/api", lambda handler: handler.reply_json({"error": none}))
    assert search(web, "serpapi", key_env="MY_KEY") == []
    web.route("/api", lambda handler: handler.reply_json({"error": f"{KEY} has run out of searches"}))
    with pytest.raises(Unavailable, match=r"'\*\*\* has run out of searches'"):
        search(web, "serpapi", key_env="MY_KEY")


@pytest.mark.parametrize(("provider", "variable"), [("brave", "BRAVE_API_KEY"), ("serpapi", "SERPAPI_API_KEY")])
def test_a_missing_or_refused_key_names_its_variable(
    web: Any, monkeypatch: pytest.MonkeyPatch, provider: str, variable: str
) -> None:
    with pytest.raises(DataError, match=f"variable {variable} is not set"):
        search(web, provider)
    assert web.asked == []
    monkeypatch.setenv(variable, "two words")
    with pytest.raises(DataError, match="not one plain word"):
        search(web, provider)
    monkeypatch.setenv(variable, KEY)
    web.put("/api", f'{{"error": "Invalid API key {KEY}: sekret%2B%2Fkey%3D1"}}'.encode(), status=401)
    with pytest.raises(DataError, match=f"answered 401.*the key in the environment variable {variable}") as caught:
        search(web, provider)
    assert "sekret" not in str(caught.value)
    with pytest.raises(DataError, match="without encryption; use an https endpoint"):
        search(web, provider, allow_private_addresses=False)


def test_a_key_does_not_follow_a_redirect(web: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERPAPI_API_KEY", KEY)
    web.put("/elsewhere", b"{}")
    web.put("/api", b"", status=302, Location="/elsewhere")
    with pytest.raises(DataError, match="correct 'endpoint'"):
        search(web, "serpapi")
    assert web.paths() == ["/api"]


def test_an_answer_of_another_shape_is_no_crash(web: Any) -> None:
    for body in (b"<html>", b"[]", b"[" * 9999, b"[" * 600 + b"]" * 600, b"\xff"):
        web.put("/api", body, "application/json")
        with pytest.raises(Unavailable, match="did not answer with a JSON object"):
            search(web, "openverse")
    for body in (b"{}", b'{"results": 3}', b'{"results": [1, null, {"url": 7}]}'):
        web.put("/api", body, "application/json")
        assert search(web, "openverse") == []


def test_a_private_endpoint_may_be_named_and_what_it_finds_may_not_be_private(web: Any) -> None:
    rows = [openverse_row(1, url=web.put("/inside.png", b"secret"))]
    web.route("/api", lambda handler: handler.reply_json({"results": rows}))

    async def run() -> None:
        options = ImageSearchOptions(provider="openverse", endpoint=web.url + "/api")
        async with make_provider(options) as provider:
            found = await provider.search("ada", 3)
            with pytest.raises(Exception, match="not a public address"):
                await provider.download(found[0])

    asyncio.run(run())
    assert web.paths() == ["/api"]


def test_a_query_without_words_is_not_asked(web: Any) -> None:
    assert search(web, "openverse", query="?!") == []
    assert web.asked == []
