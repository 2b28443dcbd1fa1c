from __future__ import annotations

from kore_fast.augmentation.images.providers.provider import plain_query, plain_text, web_address, whole_number


def test_a_query_holds_words_and_no_operators() -> None:
    assert plain_query('Mission: Impossible – "Dead" -Reckoning (2023)') == "Mission Impossible Dead Reckoning 2023"
    assert plain_query("intitle:secret OR insource:/x/") == "intitle secret or insource x"
    assert plain_query("O'Brien's AT&T well-known U.S.") == "O'Brien's AT&T well-known U.S"
    assert plain_query("Zoë Übermut 東京") == "Zoë Übermut 東京"
    assert plain_query(" -- !! \ud800 ") == ""
    assert len(plain_query("word " * 100).split()) == 40
    assert len(plain_query("longish-words " * 100)) <= 250


def test_a_strangers_text_becomes_one_line_without_markup() -> None:
    assert plain_text('<a href="http://x">Jane &amp; Co</a>\n<script>alert(1)</script>') == "Jane & Co"
    assert plain_text("a\x00b\u202ec\ud800d") == "a b c d"
    assert plain_text("x" * 1000, 10) == "x" * 10
    assert plain_text("<b></b>") is None
    assert plain_text(None) is None
    assert plain_text(3) is None


def test_addresses_and_numbers_are_what_they_should_be() -> None:
    assert web_address("https://a.example/b?c=d") == "https://a.example/b?c=d"
    for wrong in (
        "data:image/png;base64,x",
        "//a.example/b",
        "https://",
        "https://a/\n",
        None,
        3,
        "http://" + "a" * 5000,
    ):
        assert web_address(wrong) is None
    assert [whole_number(value) for value in (640, "640", 0, -1, True, 1.5, "x", None)] == [640, 640] + [None] * 6
