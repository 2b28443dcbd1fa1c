"""The report says what the numbers say: also when KORE loses, when numbers are missing, and when names are hostile."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import pytest

from kore_fast.errors import DataError
from kore_fast.intervals import wilson_interval
from kore_fast.report import build_report, load_lines, terminal_table
from kore_fast.report.figures import DARK, LIGHT, adaptation_retention, leak_map, smoothed, styles
from kore_fast.report.findings import headline, notes, verdict
from kore_fast.report.reading import LossRow, Metric, read_run
from kore_fast.report.words import ADAPTATION, METRICS, difference, interval, number

WIKIPEDIA = next(words for words in METRICS if words.name == "wikipedia_loss")
LAYERS = [f"model.language_model.layers.{layer}" for layer in range(4)]
MODULES = ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"]


def share(successes: int, n: int) -> dict[str, Any]:
    low, high = wilson_interval(successes, n)
    return {"value": successes / n, "low": low, "high": high, "count": n}


def mean(value: float, half: float = 0.02) -> dict[str, Any]:
    return {"value": value, "low": value - half, "high": value + half, "count": 64}


def metrics(new: int, capitals: int, naming: int, loss: float) -> dict[str, Any]:
    return {
        "adaptation_cem": share(new, 300),
        "adaptation_f1": mean(new / 320),
        "capitals": share(capitals, 200),
        "picture_naming": share(naming, 200),
        "wikipedia_loss": mean(loss),
    }


def write_method(run: Path, folder: str, values: dict[str, Any], **changes: Any) -> None:
    scores = {
        "method": folder,
        "kind": folder,
        "seed": 0,
        "trained_parameters": 0 if folder == "base" else 274_752,
        "settings": {} if folder == "base" else {"rank": 16, "learning_rate": 2e-4, "steps": 40, "data": "3f9a"},
        "metrics": values,
    } | changes
    (run / "evaluate" / folder).mkdir(parents=True)
    (run / "evaluate" / folder / "scores.json").write_text(json.dumps(scores))


def write_training(run: Path, folder: str, leak: float | None = None, losses: list[float] | None = None) -> None:
    adapter = run / "train" / folder / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    rows = [f"{step},0.1,{loss},0.0002,1.0" for step, loss in enumerate(losses or [3.0, 2.0, 1.5, 1.2], start=1)]
    (run / "train" / folder / "loss.csv").write_text("\n".join(["step,epoch,loss,learning_rate,grad_norm", *rows, ""]))
    if leak is not None:
        (run / "init" / folder).mkdir(parents=True)
        rows = [
            f"{layer}.{module},64,64,16,900,{leak * (1 + place)},,,,group"
            for place, layer in enumerate(LAYERS)
            for module in MODULES
        ]
        header = "layer,d_in,d_out,rank,tokens,leak,tail_energy,lambda_min,lambda_max,shares"
        (run / "init" / folder / "leak.csv").write_text("\n".join([header, *rows, ""]))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run in which KORE wins: equal adaptation, much more kept."""
    folder = tmp_path / "run"
    write_method(folder, "base", metrics(15, 84, 122, 2.871))
    write_method(folder, "lora", metrics(184, 22, 80, 3.61))
    write_method(folder, "kore", metrics(186, 80, 120, 2.885))
    write_training(folder, "lora", leak=1.0)
    write_training(folder, "kore", leak=1e-4)
    return folder


class Page(HTMLParser):
    """Tags, addresses and text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "srcset", "href", "action", "data")]
        self.text += " ".join(value or "" for name, value in attrs if name == "alt")

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(run: Path, **options: Any) -> Page:
    return Page(build_report(run, **options).read_text(encoding="utf-8"))


def test_the_page_stands_alone(run: Path) -> None:
    page = page_of(run, title="Quickstart")
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert page.tags.count("img") == 3
    assert len(page.addresses) == 6
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    html = (run / "report" / "report.html").read_text()
    assert not re.search(r"https?://|url\(|@import", html)
    assert str(run) not in html
    assert sorted(path.name for path in (run / "report").iterdir()) == [
        "adaptation_retention.png",
        "leak.png",
        "loss.png",
        "report.html",
        "results.csv",
        "results.json",
    ]


def test_the_page_holds_every_number_with_interval_and_difference(run: Path) -> None:
    page = page_of(run)
    for text in ("62.0 %", "40.0 %", "[33.5, 46.9]", "−2.0 points", "+0.014", "+0.739", "274,752", "0.0002", "3f9a"):
        assert text in page.text, text
    for word in ("null-space basis", "leak", "retention"):
        assert word in page.text


def test_the_results_files_hold_the_numbers(run: Path) -> None:
    build_report(run)
    with open(run / "report" / "results.csv", newline="") as file:
        rows = {(row["method"], row["metric"]): row for row in csv.DictReader(file)}
    assert len(rows) == 15
    row = rows["kore", "capitals"]
    assert float(row["value"]) == 0.4
    assert float(row["delta_to_base"]) == pytest.approx(-0.02)
    assert row["count"] == "200"
    assert rows["base", "capitals"]["delta_to_base"] == ""
    results = json.loads((run / "report" / "results.json").read_text())
    assert [one["method"] for one in results["methods"]] == ["base", "lora", "kore"]
    kore = results["methods"][2]
    assert kore["leak"]["largest"] == pytest.approx(4e-4)
    assert kore["leak"]["largest_layer"].startswith(LAYERS[3])
    assert kore["delta_to_base"]["wikipedia_loss"] == pytest.approx(0.014)
    assert kore["metrics"]["adaptation_cem"]["value"] == 0.62


def test_the_headline_when_kore_wins(run: Path) -> None:
    text = headline(read_run(run))
    assert text.startswith("At about equal adaptation (KORE answers 62.0 % of the questions about new facts rightly")
    assert "KORE kept more of the old knowledge than LoRA" in text
    assert "capitals 40.0 % against 11.0 % (base 42.0 %)" in text
    assert "less" not in text


def test_the_headline_when_kore_loses(tmp_path: Path) -> None:
    write_method(tmp_path, "base", metrics(15, 84, 122, 2.871))
    write_method(tmp_path, "lora", metrics(240, 80, 120, 2.9))
    write_method(tmp_path, "kore", metrics(90, 22, 60, 3.6))
    text = headline(read_run(tmp_path))
    assert text.startswith("KORE learned less than LoRA (KORE answers 30.0 %")
    assert "KORE kept less of the old knowledge than LoRA: capitals 11.0 % against 40.0 %" in text
    assert "kept more" not in text
    assert text in page_of(tmp_path).text


def test_the_headline_when_nothing_can_be_told_apart(tmp_path: Path) -> None:
    write_method(tmp_path, "base", metrics(15, 84, 122, 2.871))
    write_method(tmp_path, "lora", metrics(180, 80, 121, 2.90))
    write_method(tmp_path, "kore", metrics(192, 81, 60, 2.89))
    text = headline(read_run(tmp_path))
    assert "a difference within the sampling error" in text
    assert "KORE kept less of the old knowledge than LoRA: picture naming" in text
    assert "no difference beyond the sampling error in capitals" in text


def test_a_verdict_needs_intervals_that_do_not_meet() -> None:
    low, high = Metric(value=0.5, low=0.4, high=0.6), Metric(value=0.8, low=0.7, high=0.9)
    near = Metric(value=0.65, low=0.6, high=0.7)
    assert verdict(ADAPTATION, high, low) == "more"
    assert verdict(ADAPTATION, low, high) == "less"
    assert verdict(WIKIPEDIA, high, low) == "less"
    assert verdict(ADAPTATION, low, near) == "even"
    assert verdict(ADAPTATION, Metric(value=0.5), Metric(value=0.4)) == "more"


def test_a_missing_metric_is_a_dash_and_a_note_never_a_zero(run: Path) -> None:
    path = run / "evaluate" / "kore" / "scores.json"
    scores = json.loads(path.read_text())
    del scores["metrics"]["capitals"]
    scores["metrics"]["picture_naming"] = {"value": None, "count": 0}
    path.write_text(json.dumps(scores))
    page = page_of(run)
    assert "Not measured for KORE (shown as –): capitals of the world; picture naming." in page.text
    line = next(line for line in terminal_table(run).splitlines() if line.startswith("capitals"))
    assert line.endswith("–")
    assert " 0.0 %" not in line
    with open(run / "report" / "results.csv", newline="") as file:
        rows = [(row["method"], row["metric"]) for row in csv.DictReader(file)]
    assert ("kore", "capitals") not in rows
    assert ("kore", "picture_naming") not in rows


def test_the_base_needs_no_drift_from_itself(run: Path) -> None:
    for method in ("lora", "kore"):
        path = run / "evaluate" / method / "scores.json"
        scores = json.loads(path.read_text())
        scores["metrics"]["kl_text"] = mean(0.5)
        path.write_text(json.dumps(scores))
    assert not [note for note in notes(read_run(run)) if "Not measured" in note]


def test_one_method_alone(tmp_path: Path) -> None:
    write_method(tmp_path, "kore", metrics(186, 80, 120, 2.885))
    page = page_of(tmp_path)
    assert "KORE: new facts, CEM 62.0 %, capitals 40.0 %" in page.text
    assert "base model was not evaluated" in page.text
    assert "`kore-fast init RECIPE`" in page.text
    assert "`kore-fast train RECIPE`" in page.text
    assert "Load the adapter" not in page.text
    assert page.tags.count("img") == 1
    assert not (tmp_path / "report" / "leak.png").exists()


def test_only_the_base(tmp_path: Path) -> None:
    write_method(tmp_path, "base", metrics(15, 84, 122, 2.871))
    assert "Only the base model was evaluated" in page_of(tmp_path).text


def test_a_figure_without_numbers_is_removed(run: Path) -> None:
    build_report(run)
    shutil.rmtree(run / "init")
    build_report(run)
    assert not (run / "report" / "leak.png").exists()


@pytest.mark.parametrize(
    ("method", "change", "note"),
    [
        ("kore", {}, "All methods trained on the same data."),
        ("kore", {}, "KORE and LoRA train the same number of parameters (274,752)."),
        ("kore", {"trained_parameters": 280_000}, "about the same number of parameters (KORE 280,000, LoRA 274,752)"),
        ("kore", {"trained_parameters": 137_376}, "Not the same number of trained parameters: KORE 137,376, LoRA 274"),
        ("kore", {"trained_parameters": 137_376}, "(−50 %)"),
        ("kore", {"trained_parameters": None}, "not recorded for both"),
        ("lora", {"settings": {"data": "other", "steps": 40}}, "Not the same data: LoRA trained on other samples"),
        ("lora", {"settings": {"steps": 40}}, "is not recorded for LoRA"),
        ("lora", {"settings": {"data": "3f9a", "samples": "knowledge"}}, "Not the same data: LoRA"),
        ("kore", {"settings": {"steps": 80, "data": "3f9a"}}, "Not the same steps: LoRA 40, KORE 80."),
        ("kore", {}, "One training seed (0)"),
    ],
)
def test_what_makes_a_comparison_unlike_is_said(run: Path, method: str, change: dict[str, Any], note: str) -> None:
    path = run / "evaluate" / method / "scores.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert any(note in line for line in notes(read_run(run))), notes(read_run(run))


def test_diverged_training_is_said_and_drawn(run: Path) -> None:
    shutil.rmtree(run / "train" / "lora")
    write_training(run, "lora", losses=[3.0, 9.0, math.nan, math.inf])
    page = page_of(run)
    assert "The training loss of LoRA was not a finite number from step 3 on." in page.text
    assert (run / "report" / "loss.png").exists()


def test_hostile_names_are_shown_not_obeyed(run: Path) -> None:
    hostile = "<script>alert('x')</script>\"&{{ 7*7 }}$x^2$\x1b[31m"
    write_method(run, "other", metrics(100, 50, 50, 3.0), method=hostile, kind="<b>", settings={hostile: hostile})
    write_training(run, "other", leak=0.5)
    leaks = run / "init" / "other" / "leak.csv"
    leaks.write_text(leaks.read_text().replace(LAYERS[0] + ".self_attn.q_proj", "<img src=x onerror=y>$\\frac$"))
    page = page_of(run, title="<h1>title</h1>", note="<i>note</i>", base_model='a"b</code><script>')
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert page.tags.count("h1") == 1
    assert page.tags.count("img") == 3
    assert "<script>alert('x')</script>\"&{{ 7*7 }}$x^2$" in page.text
    assert "49" not in page.text.split("Settings")[1].split("Words")[0].replace("0.49", "")
    assert "\x1b" not in terminal_table(run)


def test_equal_inputs_give_equal_files(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere" / "copy"
    shutil.copytree(run, copy)
    build_report(run, title="t")
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "red", "savefig.dpi": 30}):
        build_report(copy, title="t")
        assert matplotlib.rcParams["font.size"] == 20
    for path in (run / "report").iterdir():
        assert path.read_bytes() == (copy / "report" / path.name).read_bytes(), path.name
    assert b"Software" not in (run / "report" / "loss.png").read_bytes()


def test_figures_show_their_numbers(run: Path) -> None:
    methods = read_run(run).methods
    both, fewer = adaptation_retention(methods, LIGHT), adaptation_retention(methods[:2], LIGHT)
    assert both
    assert fewer
    assert both != fewer
    assert both != adaptation_retention(methods, DARK)
    assert leak_map(methods[:1], LIGHT) is None
    assert leak_map(methods[1:2], LIGHT) != leak_map(methods[2:], LIGHT)


def test_many_methods_have_styles_that_differ() -> None:
    assert len(set(styles([(f"m{number}", "x") for number in range(25)]).values())) == 25


def test_styles_stay_with_the_kind() -> None:
    few = styles([("base", "base"), ("kore", "kore")])
    many = styles([("base", "base"), ("full", "full"), ("lora", "lora"), ("x", "x"), ("kore", "kore"), ("k2", "kore")])
    assert few["kore"] == many["kore"]
    assert len({style.colour for style in many.values()}) == 6


def test_smoothing_keeps_a_constant_and_skips_what_is_not_finite() -> None:
    rows = [LossRow(step, 2.0) for step in range(100)]
    assert smoothed(rows) == [2.0] * 100
    rows[50] = LossRow(50, math.nan)
    result = smoothed(rows)
    assert math.isnan(result[50])
    assert result[49] == 2.0
    assert smoothed([LossRow(1, 3.0), LossRow(2, 1.0)]) == [3.0, 1.0]


@pytest.mark.parametrize("others", [0, 5])
def test_the_terminal_table_fits(run: Path, others: int) -> None:
    for place in range(others):
        write_method(run, f"a_rather_long_name_of_a_method_{place}_{'x' * 40}", metrics(100, 50, 50, 3.0), kind="other")
    table = terminal_table(run)
    lines = table.splitlines()
    assert max(map(len, lines)) <= 100
    assert table.count("new facts, CEM ↑") == (1 if others == 0 else 4)
    assert "62.0 % [56.4, 67.3]" in table
    assert table.count("KORE") == 1


def test_the_loading_lines_are_python_and_plain(run: Path) -> None:
    lines = load_lines("train/kore/adapter", "it's/base")
    assert len(lines) == 3
    compile("\n".join(lines), "lines", "exec")
    assert "kore_fast" not in "".join(lines)
    text = page_of(run, base_model="it's/base").text
    assert all(line in text for line in lines)


def test_numbers_for_the_eye() -> None:
    assert number(ADAPTATION, 0.1234) == "12.3 %"
    assert number(WIKIPEDIA, 2.8714) == "2.871"
    assert number(WIKIPEDIA, 0.00123) == "0.0012"
    assert number(WIKIPEDIA, 0.0) == "0.000"
    assert number(WIKIPEDIA, None) == "–"
    assert difference(WIKIPEDIA, -0.0142) == "−0.014"
    assert difference(ADAPTATION, 0.05) == "+5.0 points"
    assert interval(ADAPTATION, Metric(value=0.5)) == ""


def test_nothing_evaluated_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"evaluate.*scores\.json.*kore-fast evaluate"):
        build_report(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("evaluate/kore/scores.json", "{", r"kore.scores\.json: not valid JSON"),
        (
            "evaluate/kore/scores.json",
            '{"method": "kore", "kind": "kore"}',
            r"scores\.json: metrics: .*evaluate RECIPE",
        ),
        (
            "evaluate/kore/scores.json",
            '{"method": "kore", "kind": "kore", "metrics": {"capitals": {"value": NaN}}}',
            r"metrics\.capitals\.value",
        ),
        ("init/kore/leak.csv", "layer,rank,leak\nx,1,abc\n", r"leak\.csv, row 1: .*abc.*kore-fast init"),
        ("init/kore/leak.csv", "layer,rank,leak\nx,1,1.0\ny,1,nan\n", r"leak\.csv, row 2: leak is nan"),
        ("init/kore/leak.csv", "layer,rank\nx,1\n", "column 'leak' is missing"),
        ("train/kore/loss.csv", "step,loss\n1,\n", r"loss\.csv, row 1: .*kore-fast train"),
        ("train/kore/loss.csv", "step,loss\n1\n", r"loss\.csv, row 1"),
    ],
)
def test_a_broken_file_is_named(run: Path, file: str, content: str, message: str) -> None:
    (run / file).write_text(content)
    with pytest.raises(DataError, match=message):
        build_report(run)


def test_the_headline_is_of_evoke_where_that_is_what_was_measured(run: Path) -> None:
    for file in run.glob("evaluate/*/scores.json"):
        scores = json.loads(file.read_text())
        scores["metrics"]["evoke_ka"] = scores["metrics"].pop("adaptation_cem")
        file.write_text(json.dumps(scores))
    assert headline(read_run(run)).startswith("At about equal adaptation (KORE reaches 62.0 % of EVOKE, K.A")
