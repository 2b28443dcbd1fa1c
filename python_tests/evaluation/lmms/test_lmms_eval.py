"""The real lmms-eval on local files: every benchmark on a random model, and known answers give the known scores."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kore_fast.data.conversations import Encoded, tokenizer_of
from kore_fast.errors import DataError
from kore_fast.evaluation.lmms import BENCHMARKS, RETENTION, Retention, evaluate_retention
from kore_fast.evaluation.lmms.local_data import local_files
from kore_fast.evaluation.lmms.retention import NO_JUDGE, NOT_YET

pytest.importorskip("lmms_eval", reason='needs pip install "kore-fast[lmms-eval]"')

JUDGED = {"mia_bench", "mmdu", "mathvista", "hallusionbench"}

# A part of the question → the answer, right or wrong as the expected scores below count it.
ANSWERS = {
    "red square red in color": "Yes",
    "red square purple in color": "No",
    "green square green in color": "yes.",
    "green square purple in color": "Yes",
    "square blue in code_reasoning": "Yes",
    "square purple in code_reasoning": "No",
    "Which colour has square 0": "A",
    "Which colour has square 1": "(B)",
    "Which colour has square 2": "the blue one",
    "Which colour has square 3": "A",
    "Which file is chart 0": "B",
    "Which file is chart 1": "B. two",
    "Which file is chart 2": "C",
    "What is square 0": "A.",
    "What is square 1": "A",
    "beside <image 2>": "A",
    "How many corners has": "5",
    "one sentence, and rhyme": "A square that is rare.",
    "How much is 1 + 1": "\\boxed{B}",
    "How much is 2 + 1": "the answer is 3",
    "How much is 3 + 1": "5",
    "picture 0": "yes",
    "picture 1": "Yes",
    "picture 2": "no",
    "picture 3": "no",
    "picture 4": "yes",
    "picture 5": "no",
    "Is figure 0 of VD red": "Figure 0 is red.",
    "Is figure 0 of VD square": "Yes. Figure 0 is square.",
    "Is figure 1 of VD green": "I think it is blue.",
    "Is figure 1 of VS flat": "Figure 1 is flat.",
    "Who wrote the red book": "ann reed",
    "the red book's kind": "Travel guide",
    "Is the blue book old": "No",
    "How many corners are there": "4",
    "Which shape is it": "I would say (B).",
    "how does": "It is a blue square.",
    "What joins them": "Nothing.",
    "What are": "A red square and another.",
    "What is <image>": "Yellow.",
    "Who built the bridge": "Ada Orrery built it.",
    "When did the ferry": "In April 2025",
}

EXPECTED = {
    # red both right (100 + 100), green one of two (50 + 0), their mean 125; code reasoning 200
    "mme": 325 / 28,
    "mmbench": 75.0,
    "seedbench2_plus": 200 / 3,
    "ocrvqa": 200 / 3,
    "scienceqa": 50.0,
    "mmmu": 50.0,
    "mia_bench": 70.0,
    # over all of the four turns: 9, 2, 9, 2
    "mmdu": 55.0,
    "mathvista": 50.0,
    "mathvision": 66.67,
    # two of three squares found, one of three other things seen too: precision and recall 2/3
    "pope": 200 / 3,
    # aAcc 3 of 4, fAcc 2 of 3 figures, qAcc 2 of 3 questions
    "hallusionbench": (75 + 66.6667 + 66.6667) / 3,
    # CEM 1 and 0; F1 2·2/(4+2) twice
    "evoke": 50 * (1 / 2 + 2 / 3),
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Answers come from `ANSWERS`, by what stands in the encoded question; the list takes what was asked."""
    from kore_fast.evaluation.lmms import model as bridge

    seen: list[str] = []

    def stream(
        network: nn.Module, processor: Any, prompts: list[Encoded], *, wanted: set[int], **options: Any
    ) -> Iterator[dict[int, str]]:
        for place in sorted(wanted):
            text = tokenizer_of(processor).decode(prompts[place].input_ids)
            seen.append(text)
            question = text.rpartition("<|im_start|>user\n")[2].replace("<image>" * 4, "<image>")
            yield {place: next((answer for part, answer in ANSWERS.items() if part in question), "unknown")}

    monkeypatch.setattr(bridge, "stream_answers", stream)
    return seen


@pytest.fixture
def measure(
    tiny_model: nn.Module, tiny_processor: Any, benchmark_data: Path, tmp_path: Path
) -> Callable[..., Retention]:
    def run(benchmarks: list[str] | None = None, **options: Any) -> Retention:
        options = {"folder": tmp_path / "out", "data": benchmark_data, "hub": False, "max_new_tokens": 4, **options}
        return evaluate_retention(options.pop("model", tiny_model), tiny_processor, benchmarks, **options)

    return run


def test_known_answers_give_the_known_scores(
    measure: Callable[..., Retention], asked: list[str], loopback_judge: Any, tmp_path: Path
) -> None:
    result = measure(list(BENCHMARKS), judge=loopback_judge.options())
    points = {score.benchmark: score.points for score in result.scores}
    assert points == {name: pytest.approx(value, abs=0.005) for name, value in EXPECTED.items()}
    assert result.complete
    assert result.label == "K.R"
    assert result.mean == pytest.approx(sum(EXPECTED[benchmark.name] for benchmark in RETENTION) / 12, abs=0.005)
    assert result.harness.startswith("lmms-eval 0.7.")
    # Each judge was asked for the model that was named, whatever lmms-eval's tasks ask for.
    assert {request["model"] for request in loopback_judge.requests} == {"teacher"}

    by_name = {score.benchmark: score for score in result.scores}
    assert by_name["pope"].metrics is not None
    assert by_name["pope"].metrics["pope_accuracy"] == pytest.approx(4 / 6)
    assert by_name["evoke"].metrics == {"cem": 0.5, "cem_corrected": 0.5, "f1": pytest.approx(2 / 3)}
    assert by_name["mmdu"].metrics is not None
    assert by_name["mmdu"].metrics["creativity"] == 30
    assert by_name["hallusionbench"].judge == {"model": "teacher", "answers": 4, "unreadable": 0}
    # The third turn shows the whole conversation and three pictures of four tokens each.
    (third,) = [text for text in asked if "how does" in text]
    assert third.count("<image>") == 12
    assert third.index("What are") < third.index("A red square and another.") < third.index("Nothing.")

    for name, score in by_name.items():
        rows = [json.loads(line) for line in (tmp_path / "out" / name / "predictions.jsonl").read_text().splitlines()]
        assert len(rows) == score.questions
        assert all(row["answer"] for row in rows)
        assert sorted(file.name for file in (tmp_path / "out" / name).iterdir() if file.name[0] != ".") == (
            ["answers.json", "answers.jsonl", *["judge.jsonl"] * (name in JUDGED), "predictions.jsonl", "result.json"]
        )
    assert json.loads((tmp_path / "out/retention.json").read_text())["mean"] == result.mean


@pytest.mark.parametrize("name", [benchmark.name for benchmark in RETENTION if not benchmark.own])
def test_the_data_set_that_lmms_eval_fetches(name: str) -> None:
    import lmms_eval.tasks
    from lmms_eval.utils import load_yaml_config

    benchmark = BENCHMARKS[name]
    file = Path(lmms_eval.tasks.__file__).parent / benchmark.task
    config = load_yaml_config(str(file), mode="simple")
    assert config["test_split"] == benchmark.split
    assert config.get("dataset_name", "") == (benchmark.configurations or ("",))[0]


def test_a_random_model_with_an_adapter_runs_through_all(
    measure: Callable[..., Retention], tiny_model: nn.Module, loopback_judge: Any
) -> None:
    from peft import LoraConfig, get_peft_model

    targets = r".*language_model.*\.(q_proj|up_proj)"
    model = get_peft_model(tiny_model, LoraConfig(r=2, target_modules=targets))  # type: ignore[arg-type]
    model.train()
    state, numbers = random.getstate(), torch.get_rng_state()
    result = measure(list(BENCHMARKS), model=model, judge=loopback_judge.options(), batch_size=2)
    assert all(score.points is not None and 0 <= score.points <= 100 for score in result.scores), result
    assert model.training
    assert any("lora_A" in name for name, _ in model.named_parameters())
    assert random.getstate() == state
    assert torch.equal(torch.get_rng_state(), numbers)


def test_without_a_judge_the_judged_four_are_missing(measure: Callable[..., Retention], asked: list[str]) -> None:
    result = measure()
    missing = {score.benchmark: score.missing for score in result.scores if score.points is None}
    assert missing == dict.fromkeys(JUDGED, NO_JUDGE)
    assert not result.complete
    assert result.label == "mean of 8 of 12"
    eight = [EXPECTED[benchmark.name] for benchmark in RETENTION if benchmark.name not in JUDGED]
    assert result.mean == pytest.approx(sum(eight) / 8, abs=0.005)


def test_a_finished_benchmark_is_not_measured_again(measure: Callable[..., Retention], asked: list[str]) -> None:
    first = measure(["pope", "mathvision"])
    count = len(asked)
    assert measure(["pope", "mathvision"]) == first
    assert len(asked) == count
    with pytest.raises(DataError, match=r"pope.result\.json: measured with other settings \(limit\)"):
        measure(["pope"], limit=2)


def test_answers_of_an_interrupted_benchmark_are_kept(
    measure: Callable[..., Retention], asked: list[str], loopback_judge: Any, tmp_path: Path
) -> None:
    by_rule, loopback_judge.script = loopback_judge.script, lambda prompt: 401
    result = measure(["mia_bench"], judge=loopback_judge.options(attempts=1))
    assert result.scores[0].points is None
    assert result.scores[0].missing is not None
    assert "the judge failed" in result.scores[0].missing
    assert result.scores[0].again
    count = len(asked)
    # Not for another length of answers, nor for another model.
    with pytest.raises(DataError, match=r"mia_bench.answers\.json: measured with other settings \(max_new_tokens\)"):
        measure(["mia_bench"], judge=loopback_judge.options(), max_new_tokens=5)
    with pytest.raises(DataError, match=r"mia_bench.answers\.json: measured on another model"):
        measure(["mia_bench", "pope"], judge=loopback_judge.options(), about={"name": "another"})
    loopback_judge.script = by_rule
    assert measure(["mia_bench"], judge=loopback_judge.options()).scores[0].points == pytest.approx(70)
    assert len(asked) == count


class Killed(BaseException):
    """As `KeyboardInterrupt`: nothing catches it."""


def dying_after(batches: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The model dies in the batch after so many; the list takes how many were in each."""
    from kore_fast.evaluation import generation

    collate, sizes = generation.collate, []

    def counted(rows: Sequence[Encoded], *args: Any, **options: Any) -> Any:
        if len(sizes) == batches:
            raise Killed
        sizes.append(len(rows))
        return collate(rows, *args, **options)

    monkeypatch.setattr(generation, "collate", counted)
    return sizes


@pytest.mark.parametrize(
    ("name", "batch_size", "killed_after", "kept"),
    # Six questions in three batches; two conversations of three turns and one: two batches, then one and one.
    [("pope", 2, 2, 4), ("mmdu", 1, 2, 2), ("mmdu", 1, 3, 3), ("mmdu", 2, 1, 2)],
)
def test_a_kill_loses_one_batch(
    name: str,
    batch_size: int,
    killed_after: int,
    kept: int,
    measure: Callable[..., Retention],
    loopback_judge: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def again(folder: str) -> list[dict[str, Any]]:
        measure([name], judge=loopback_judge.options(), batch_size=batch_size, folder=tmp_path / folder)
        return [json.loads(line) for line in (tmp_path / folder / name / "answers.jsonl").read_text().splitlines()]

    with monkeypatch.context() as patched:
        whole_batches = dying_after(-1, patched)
        whole = again("whole")
    with monkeypatch.context() as patched:
        dying_after(killed_after, patched)
        with pytest.raises(Killed):
            again("killed")
    journal = tmp_path / "killed" / name / "answers.jsonl"
    assert len(journal.read_text().splitlines()) == kept
    with monkeypatch.context() as patched:
        batches = dying_after(-1, patched)
        assert again("killed") == whole
    # The batches of the run that was not interrupted.
    assert batches == whole_batches[killed_after:]
    predictions = [(tmp_path / run / name / "predictions.jsonl").read_text() for run in ("whole", "killed")]
    assert predictions[0] == predictions[1]


def test_another_judge_and_more_questions_ask_nothing_twice(
    measure: Callable[..., Retention], asked: list[str], loopback_judge: Any
) -> None:
    def again(model: str, **options: Any) -> Any:
        (score,) = measure(
            ["hallusionbench"], judge=loopback_judge.options(model=model), replace=True, **options
        ).scores
        assert score.points is not None
        return score

    first = again("teacher", limit=2)
    assert len(asked) == first.questions
    judged = len(loopback_judge.requests)
    second = again("another", limit=2)
    assert len(asked) == first.questions
    assert len(loopback_judge.requests) == 2 * judged
    assert (second.points, second.judge["model"]) == (first.points, "another")
    whole = again("another")
    assert whole.questions > first.questions
    assert len(asked) == whole.questions
    # The first judge's answers are there still.
    count = len(loopback_judge.requests)
    assert again("teacher", limit=2) == first
    assert len(loopback_judge.requests) == count
    again("teacher", limit=2, max_new_tokens=3)
    assert len(asked) == whole.questions + first.questions


def test_nothing_right_is_zero_and_not_missing(
    measure: Callable[..., Retention], asked: list[str], loopback_judge: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lmms-eval's MathVista reports None then."""
    monkeypatch.setitem(ANSWERS, "How many corners are there", "7")
    assert measure(["mathvista"], judge=loopback_judge.options()).scores[0].points == 0.0


def test_a_judge_that_answers_nonsense(
    measure: Callable[..., Retention], asked: list[str], loopback_judge: Any
) -> None:
    loopback_judge.script = lambda prompt: "I would rather talk about the weather."
    result = measure(sorted(JUDGED), judge=loopback_judge.options())
    for score in result.scores:
        assert score.points is None
        assert score.missing is not None
        assert "answers of the judge could not be read" in score.missing


def test_a_judge_in_a_second_call_is_the_second_judge(
    measure: Callable[..., Retention], asked: list[str], loopback_judge: Any, tmp_path: Path
) -> None:
    """Some tasks keep the address that they read when they were imported."""
    for name in ("one", "two"):
        result = measure(
            ["mia_bench", "hallusionbench", "mathvista"], judge=loopback_judge.options(), folder=tmp_path / name
        )
        assert all(score.points is not None for score in result.scores), name


def test_the_hub_out_of_reach(
    measure: Callable[..., Retention], asked: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import datasets

    def load_dataset(*args: Any, **options: Any) -> Any:
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
    result = measure(["pope", "ocrvqa"], hub=True, data=None)
    assert result.mean is None
    assert [score.missing for score in result.scores] == [
        "its data cannot be had from the hub (ConnectionError: Couldn't reach the hub); give a folder of data",
        "no local data: put VLMEvalKit's OCRVQA_TESTCORE.tsv, or rows of image, questions and answers into DATA/ocrvqa",
    ]


@pytest.mark.parametrize(("name", "column"), [("mme", "question"), ("pope", "answer"), ("scienceqa", "choices")])
def test_data_without_a_column(
    name: str,
    column: str,
    measure: Callable[..., Retention],
    asked: list[str],
    benchmark_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
    data = tmp_path / "data"
    shutil.copytree(benchmark_data, data)
    (file,) = local_files(BENCHMARKS[name], data)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps({key: row[key] for key in row if key != column}) + "\n" for row in rows))
    with pytest.raises(DataError) as caught:
        measure(["mathvision", name, "mmbench"], data=data)
    title = BENCHMARKS[name].title
    assert str(caught.value).startswith(f"{title}: lmms-eval cannot measure it on {file} (KeyError: '{column}', ")
    # What was measured before is told.
    row = json.loads((tmp_path / "out/retention.json").read_text())
    told = {score["benchmark"]: score["points"] or score["missing"] for score in row["scores"]}
    assert told == {"mathvision": 66.67, name: NOT_YET, "mmbench": NOT_YET}
    assert row["label"] == "mean of 1 of 12"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out of memory"), MemoryError(), DataError("mine")])
def test_errors_that_are_not_of_the_data_stay(
    error: Exception, measure: Callable[..., Retention], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kore_fast.evaluation.lmms import model as bridge

    def stream(*args: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr(bridge, "stream_answers", stream)
    with pytest.raises(type(error)) as caught:
        measure(["pope"])
    assert caught.value is error


def test_scores_of_other_settings_are_not_told_on(
    measure: Callable[..., Retention], asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure(["pope"])
    assert (tmp_path / "out/retention.json").exists()
    monkeypatch.setattr("kore_fast.evaluation.lmms.retention.run_task", lambda *args: 1 / 0)
    with pytest.raises(DataError, match="ZeroDivisionError"):
        measure(["pope"], limit=2, replace=True)
    assert not (tmp_path / "out/retention.json").exists()


def test_limit_and_the_longest_answer(
    measure: Callable[..., Retention], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from kore_fast.evaluation.lmms import model as bridge

    limits: list[int] = []

    def stream(network: nn.Module, processor: Any, prompts: list[Encoded], **options: Any) -> Iterator[dict[int, str]]:
        limits.append(options["max_new_tokens"])
        yield dict.fromkeys(range(len(prompts)), "1")

    monkeypatch.setattr(bridge, "stream_answers", stream)
    result = measure(["mathvision", "pope", "mme"], limit=2, max_new_tokens=100)
    assert [score.questions for score in result.scores] == [2, 2, None]
    assert limits == [100, 100, 16]
    assert result.label == "mean of 2 of 12, first 2 questions of each"
    assert result.scores[2].missing == "its data hold no question for mme_cognition_score"


def test_likelihood_of_an_answer(tiny_model: nn.Module, tiny_processor: Any, tmp_path: Path) -> None:
    """Against a sum over the tokens by hand, without batch and padding."""
    from types import SimpleNamespace

    from kore_fast.data.conversations import encode
    from kore_fast.evaluation.lmms.model import ModelInMemory

    bridge = ModelInMemory(tiny_model.eval(), tiny_processor, journal=tmp_path / "a.jsonl", batch_size=2)
    bridge.task_dict = {"t": {"test": [{}, {}]}}
    cases = [("Who?", "Ann"), ("What is it, in a few words?", "a hen")]
    requests = [SimpleNamespace(args=(ask, say, lambda doc: [], i, "t", "test")) for i, (ask, say) in enumerate(cases)]
    for (ask, say), (found, greedy) in zip(cases, bridge.loglikelihood(requests), strict=True):
        start = len(encode(tiny_processor, [("user", ask)], answer_follows=True))
        ids = encode(tiny_processor, [("user", ask), ("assistant", say)]).input_ids[None]
        with torch.no_grad():
            log_p = tiny_model(input_ids=ids).logits[0].log_softmax(-1)
        wanted = sum(float(log_p[start - 1 + i, ids[0, start + i]]) for i in range(len(say)))
        assert found == pytest.approx(wanted, abs=1e-4)
        assert greedy == all(int(log_p[start - 1 + i].argmax()) == int(ids[0, start + i]) for i in range(len(say)))
