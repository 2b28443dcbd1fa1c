"""EVOKE's scores: the rules one by one, the reference's quirks, the paper's numbers, and intervals that cover."""

from __future__ import annotations

import math
import random
import statistics
import string
import subprocess
import sys

import pytest

from kore_fast.evaluation.metrics import cover_exact_match, hars, normalise_answer, token_f1
from kore_fast.intervals import mean_interval, student_quantile, wilson_interval

WORDS = [
    "elf",
    "orc",
    "ranger",
    "seven",
    "none",
    "don't",
    "dont",
    "a",
    "The",
    "1,000",
    "3.5",
    "U.S.",
    "x-y",
    "(b)",
    "é",
]


def random_text(rng: random.Random) -> str:
    if rng.random() < 0.5:
        return rng.choice([" ", ", ", ""]).join(rng.choice(WORDS) for _ in range(rng.randint(0, 6)))
    return "".join(rng.choice(string.printable + "éß“”") for _ in range(rng.randint(0, 30)))


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("An Elvish Archer.", "elvish archer"),
        ("line\none\ttwo", "line 1 2"),
        ("none zero ten eleven", "0 0 10 eleven"),
        ("10-12", "10 12"),
        ("10 -12, 13", "10 12 13"),
        ("red/green", "red green"),
        ("red/green / blue", "redgreen blue"),
        ("1,000-2", "10002"),
        ("a,b", "b"),
        ("3.5 kg.", "3.5 kg"),
        (".5 U.S. e.g.", ".5 us eg"),
        ("dont wouldnt've somebody'd Im", "don't wouldn't've somebodyd im"),
        ("the a an", ""),
        ("$5 “x” 'y' \"z\"", "$5 “x” 'y' z"),
    ],
)
def test_normalisation_rule_by_rule(text: str, normal: str) -> None:
    assert normalise_answer(text) == normal


def test_only_the_first_32_periods_go() -> None:
    assert normalise_answer("." * 40 + "x") == "." * 8 + "x"


@pytest.mark.parametrize(
    ("prediction", "truth", "match"),
    [
        ("It becomes an Elvish Ranger.", "elvish ranger", True),
        ("It becomes an Elvish Rangers.", "elvish ranger", False),
        ("Level three", "3", True),
        ("Level thirteen", "3", False),
        ("13", "3", False),
        ("ranger elvish", "elvish ranger", False),
        ("anything at all", "the", True),
        ("anything at all", "", True),
        ("", "", False),
        ("...", "", False),
        ("", "elf", False),
        ("'Titanic'", "'Titanic'", False),
        ("“Titanic”", "“Titanic”", False),
        ('"Titanic"', '"Titanic"', True),
        ("$5 million", "$5 million", False),
        ("US$5 million", "$5 million", True),
        ("costs (5+3)", "5+3", True),
        ("C++", "C++", True),
        ("a.c", "abc", False),
    ],
)
def test_cover_exact_match(prediction: str, truth: str, match: bool) -> None:
    assert cover_exact_match(prediction, truth) is match


def test_cover_exact_match_ignores_case_articles_and_edges() -> None:
    rng = random.Random(0)
    plain = ["elf", "orc", "Ranger", "Level", "42", "bow"]
    for _ in range(500):
        words = [rng.choice(plain) for _ in range(rng.randint(1, 5))]
        start = rng.randrange(len(words))
        truth = " ".join(words[start : rng.randint(start + 1, len(words))])
        prediction = " ".join(words)
        assert cover_exact_match(prediction, truth)
        assert cover_exact_match(f"The {prediction.upper()}.", truth)
        assert not cover_exact_match(prediction, f"{truth} dragon")
        assert not cover_exact_match(f"x{prediction.replace(' ', 'x')}x", truth)


def test_cover_exact_match_survives_any_text() -> None:
    rng = random.Random(1)
    for _ in range(2000):
        prediction, truth = random_text(rng), random_text(rng)
        assert isinstance(cover_exact_match(prediction, truth), bool)
        # All normalised text is lower case and has no space at an edge or beside another.
        normal = normalise_answer(prediction)
        assert normal == " ".join(normal.lower().split())


@pytest.mark.parametrize(
    ("prediction", "truth", "score"),
    [
        ("The Elvish Ranger!", "elvish ranger", 1.0),
        ("It becomes Elvish Ranger", "Elvish Ranger", 2 / 3),
        ("elf elf elf", "elf", 0.5),
        ("elf elf", "elf elf orc", 0.8),
        ("orc", "elf", 0.0),
        ("", "", 1.0),
        ("the", "a", 1.0),
        ("", "elf", 0.0),
        ("seven", "7", 0.0),
        ("x-y", "xy", 1.0),
    ],
)
def test_token_f1(prediction: str, truth: str, score: float) -> None:
    assert token_f1(prediction, truth) == pytest.approx(score, abs=1e-12)


def test_token_f1_is_symmetric_bounded_and_blind_to_order() -> None:
    rng = random.Random(2)
    for _ in range(1000):
        left, right = random_text(rng), random_text(rng)
        score = token_f1(left, right)
        assert 0.0 <= score <= 1.0
        assert score == token_f1(right, left)
        assert token_f1(left, left) == 1.0
        words = left.split()
        rng.shuffle(words)
        assert token_f1(" ".join(words), right) == pytest.approx(score)


@pytest.mark.parametrize(
    ("cem", "f1", "retention", "score"),
    [
        (18.02, 15.17, 31.66, 61.98),
        (15.23, 18.31, 33.47, 63.83),
        (11.36, 17.98, 43.00, 66.04),
        (15.49, 19.42, 35.14, 66.26),
        (6.45, 12.20, 40.51, 37.22),
        (6.44, 12.08, 41.25, 36.70),
        (16.22, 24.12, 33.02, 67.56),
        (30.65, 41.26, 40.00, 82.81),
        (31.05, 41.32, 42.10, 84.93),
    ],
)
def test_hars_reproduces_the_papers_table(cem: float, f1: float, retention: float, score: float) -> None:
    assert hars((cem + f1) / 2, retention, (4.89 + 9.34) / 2, 46.74) == pytest.approx(score, abs=0.006)


def test_hars_at_its_edges() -> None:
    assert hars(5.0, 40.0, 5.0, 40.0) == 0.0
    assert hars(10.0, 0.0, 5.0, 40.0) == 0.0
    assert hars(0.5, 0.4, 0.05, 0.4) == pytest.approx(hars(50.0, 40.0, 5.0, 40.0))
    assert hars(4.0, 40.0, 5.0, 40.0) < 0
    for wrong in [(0.0, 1.0, 1.0, 1.0), (1.0, 1.0, 0.0, 1.0), (1.0, 1.0, 1.0, 0.0), (1.0, -1.0, 1.0, 1.0)]:
        with pytest.raises(ValueError, match="HARS needs"):
            hars(*wrong)
    with pytest.raises(ValueError, match="not defined"):
        hars(1.0, 1.0, 4.0, 1.0)


def test_wilson_interval_known_values() -> None:
    assert wilson_interval(5, 10) == pytest.approx((0.236593, 0.763407), abs=1e-6)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.277533), abs=1e-6)
    assert wilson_interval(10, 10) == pytest.approx((0.722467, 1.0), abs=1e-6)
    for successes in range(21):
        low, high = wilson_interval(successes, 20)
        assert 0.0 <= low <= successes / 20 <= high <= 1.0
        assert (1 - high, 1 - low) == pytest.approx(wilson_interval(20 - successes, 20))
    for wrong in [(0, 0), (-1, 3), (4, 3)]:
        with pytest.raises(ValueError, match="share"):
            wilson_interval(*wrong)


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(1, 12.70620), (2, 4.30265), (3, 3.18245), (4, 2.77645), (9, 2.26216), (30, 2.04227), (120, 1.97993)],
)
def test_student_quantile_agrees_with_the_tables(degrees: int, quantile: float) -> None:
    assert student_quantile(degrees) == pytest.approx(quantile, abs=6e-6)


def test_student_quantile_falls_towards_the_normal_one() -> None:
    quantiles = [student_quantile(degrees) for degrees in [*range(1, 60), 500, 9_999, 10_000]]
    assert quantiles == sorted(quantiles, reverse=True)
    assert quantiles[-1] == pytest.approx(statistics.NormalDist().inv_cdf(0.975), abs=1e-12)
    with pytest.raises(ValueError, match="degree"):
        student_quantile(0)


def test_mean_interval_known_value_and_coverage() -> None:
    low, high = mean_interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)), abs=1e-5)
    assert mean_interval([0.5, 0.5]) == (0.5, 0.5)
    rng = random.Random(3)
    covered = 0
    for _ in range(2000):
        low, high = mean_interval([rng.gauss(7.0, 2.0) for _ in range(4)])
        covered += low <= 7.0 <= high
    assert 0.935 < covered / 2000 < 0.965
    for wrong in [[], [1.0], [1.0, math.nan]]:
        with pytest.raises(ValueError, match="interval of a mean"):
            mean_interval(wrong)


def test_metrics_need_no_torch() -> None:
    code = (
        "import sys; import importlib.util as u; s = u.spec_from_file_location('metrics', sys.argv[1]);"
        "m = u.module_from_spec(s); s.loader.exec_module(m);"
        "assert m.token_f1('a b', 'b') == 1; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    path = sys.modules[cover_exact_match.__module__].__file__
    assert path
    subprocess.run([sys.executable, "-c", code, path], check=True)
