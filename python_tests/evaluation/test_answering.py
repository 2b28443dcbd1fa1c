"""Who answers: an adapter that does not fit is refused, and a server that misbehaves costs no answer."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from kore_fast.errors import ConstraintError, DataError, KoreError, LanguageModelError
from kore_fast.evaluation.answering import (
    Answer,
    EndpointAnswerer,
    ModelAnswerer,
    data_url,
    load_adapted,
    load_answerer,
)
from kore_fast.evaluation.generation import Prompt, generate_answers
from kore_fast.modules.loading import load_model
from python_tests.augmentation.language.server import Reply, Script, Server, error


@pytest.fixture
def adapter(loud_model_folder: Path, tmp_path: Path) -> Path:
    """A LoRA adapter that changes what `loud_model` says."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(2)
    config = LoraConfig(r=2, target_modules=r".*language_model.*\.(q_proj|v_proj)", init_lora_weights=False)
    get_peft_model(load_model(loud_model_folder), config).save_pretrained(str(tmp_path / "adapter"))  # type: ignore[arg-type]
    return tmp_path / "adapter"


PROMPTS = [Prompt(f"Who lives on hill {n * 7}?") for n in range(4)]


def asked(answerer: Any, prompts: list[Prompt] = PROMPTS) -> list[Answer]:
    found: dict[int, Answer] = {}
    for answers in answerer.answers(prompts, range(len(prompts))):
        found |= answers
    return [found[i] for i in range(len(prompts))]


def test_an_adapter_answers_unmerged_as_a_merged_model_does(
    loud_model_folder: Path, adapter: Path, tiny_processor: Any
) -> None:
    from peft import PeftModel

    plain = load_answerer(loud_model_folder, max_new_tokens=6)
    with_adapter = load_answerer(loud_model_folder, adapter, max_new_tokens=6)
    assert isinstance(with_adapter.model, PeftModel)
    merged = PeftModel.from_pretrained(load_model(loud_model_folder), str(adapter)).merge_and_unload()  # type: ignore[arg-type, operator]
    wanted = generate_answers(merged, tiny_processor, PROMPTS, max_new_tokens=6)
    assert [answer.text for answer in asked(with_adapter)] == wanted
    assert [answer.text for answer in asked(plain)] != wanted
    assert plain.about["weights"] == with_adapter.about["weights"]
    assert "adapter_weights" in with_adapter.about
    assert plain.about["dtype"] == "float32"


def test_no_model_no_processor_no_adapter_are_clear_errors(tiny_model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(KoreError, match="/no/such/model: cannot load a model"):
        load_answerer("/no/such/model")
    with pytest.raises(DataError, match="no adapter there; give the folder that holds adapter_config"):
        load_answerer(tiny_model_folder, tmp_path / "nowhere")
    bare = tmp_path / "bare"
    shutil.copytree(tiny_model_folder, bare, ignore=shutil.ignore_patterns("*token*", "*processor*", "*jinja"))
    with pytest.raises(KoreError, match=r"bare: a model without its processor|no image processor"):
        asked(load_answerer(bare), [Prompt("Who?", tmp_path / "x.png")])


def rename(folder: Path, old: str, new: str) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({key.replace(old, new): value for key, value in tensors.items()}, folder / "adapter_model.safetensors")


def spoil_prefix(folder: Path) -> None:
    rename(folder, "model.language_model", "language_model.model")


def spoil_shape(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "adapter_model.safetensors")
    wide = {key: value.repeat(1, 2) if "lora_A" in key else value for key, value in tensors.items()}
    save_file(wide, folder / "adapter_model.safetensors")


def spoil_targets(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_modules"] = r".*language_model.*\.(q_proj|v_proj|k_proj)"
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_prefix, "layers are not in this model"),
        (spoil_shape, "the adapter is for a weight of shape"),
        (spoil_targets, r"k_proj.* the adapter's file holds nothing for it"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "no such file"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x" * 40), "not a whole safetensors file"),
        (lambda folder: (folder / "adapter_config.json").write_text("[]"), "not an object"),
    ],
    ids=["prefix", "shape", "targets", "no file", "torn", "config"],
)
def test_an_adapter_that_would_change_nothing_is_refused(
    loud_model_folder: Path, adapter: Path, spoil: Any, message: str
) -> None:
    spoil(adapter)
    with pytest.raises((ConstraintError, DataError), match=message):
        load_answerer(loud_model_folder, adapter)


def test_other_kinds_of_adapters_are_checked_too(
    tiny_model: nn.Module, tiny_model_folder: Path, tmp_path: Path
) -> None:
    from peft import IA3Config, get_peft_model

    config = IA3Config(target_modules=r".*language_model.*k_proj", feedforward_modules=[])
    made = get_peft_model(tiny_model, config)  # type: ignore[arg-type]
    made.save_pretrained(str(tmp_path / "ia3"))
    assert isinstance(load_adapted(load_model(tiny_model_folder), tmp_path / "ia3"), nn.Module)
    rename(tmp_path / "ia3", "layers.0.", "layers.7.")
    with pytest.raises(ConstraintError, match=r"layers\.0\..*holds nothing for it"):
        load_adapted(load_model(tiny_model_folder), tmp_path / "ia3")


def test_pictures_need_a_model_that_sees(tiny_model: nn.Module, tiny_processor: Any, knowledge_folder: Path) -> None:
    blind = ModelAnswerer(tiny_model, tiny_processor.tokenizer, max_new_tokens=2)
    with pytest.raises(KoreError, match="no image processor"):
        asked(blind, [Prompt("What?", knowledge_folder / "images" / "red.png")])


# A server.


def served(server: Server, **options: Any) -> EndpointAnswerer:
    given: dict[str, Any] = {"attempts": 2, "backoff": 0.01, "timeout": 5, "concurrency": 2, **options}
    return EndpointAnswerer.greedy("my-model", server.url, **given)


def text_of(body: Mapping[str, Any]) -> str:
    content = body["messages"][0]["content"]
    return content if isinstance(content, str) else next(part["text"] for part in content if part["type"] == "text")


def echo(body: dict[str, Any], times: int) -> Reply:
    return Reply(content=f" You ask: {text_of(body)} ")


def test_questions_and_pictures_go_out_as_openai_wants_them(knowledge_folder: Path, tmp_path: Path) -> None:
    red = knowledge_folder / "images" / "red.png"
    Image.new("RGB", (5, 4), "blue").save(tmp_path / "blue.bmp")
    prompts = [Prompt("Plain?"), Prompt("Red?", red), Prompt("Blue?", tmp_path / "blue.bmp")]
    with Server(echo) as server:
        found = asked(served(server), prompts)
    assert [answer.text for answer in found] == [f"You ask: {prompt.text}" for prompt in prompts]
    bodies = {text_of(body): body for body in server.requests}
    assert all((b["temperature"], b["max_tokens"], b["model"]) == (0.0, 128, "my-model") for b in bodies.values())
    assert all("response_format" not in body for body in bodies.values())
    assert bodies["Plain?"]["messages"] == [{"role": "user", "content": "Plain?"}]
    for name, same in (("Red?", red), ("Blue?", None)):
        picture, text = bodies[name]["messages"][0]["content"]
        assert text == {"type": "text", "text": name}
        head, _, data = picture["image_url"]["url"].partition(",")
        assert head == "data:image/png;base64"
        if same is not None:
            assert base64.b64decode(data) == same.read_bytes()
        else:
            with Image.open(io.BytesIO(base64.b64decode(data))) as image:
                assert (image.size, image.getpixel((0, 0))) == ((5, 4), (0, 0, 255))


def message(parts: dict[str, Any], finish: str = "stop") -> Reply:
    return Reply(body={"choices": [{"index": 0, "message": {"role": "assistant", **parts}, "finish_reason": finish}]})


@pytest.mark.parametrize(
    ("nonsense", "reason"),
    [
        (Reply(raw=b"<html><body>Welcome to nginx</body></html>"), "no JSON"),
        (Reply(body={"choices": []}), "no chat completion"),
        (Reply(body={"error": "overloaded"}), "no chat completion"),
        (Reply(body=["?"]), "no chat completion"),
        (Reply(truncate=True, content="x"), "connection"),
        (Reply(reset=True), "connection"),
        (error(500, "worker died"), "500: worker died"),
        (error(400, "the picture is too large"), "400: the picture is too large"),
        (Reply(content="", finish="content_filter"), "content filter"),
        (message({"content": None}), "no text"),
        (message({}), "no text"),
        (message({"content": {"a": 1}}), "no text"),
        (message({"content": None, "reasoning": "Hm"}, finish="length"), "used up before any text"),
        (Reply(content=" ", finish="length"), "used up before any text"),
    ],
    ids=[
        "html",
        "choices",
        "error",
        "list",
        "cut",
        "reset",
        "500",
        "400",
        "filter",
        "null",
        "no-content",
        "object",
        "thought-long",
        "blank",
    ],
)
def test_a_question_without_an_answer_is_missing_and_the_others_are_kept(nonsense: Reply, reason: str) -> None:
    def script(body: dict[str, Any], times: int) -> Reply:
        return nonsense if text_of(body) == PROMPTS[2].text else echo(body, times)

    with Server(script) as server:
        found = asked(served(server))
        tries = sum(text_of(body) == PROMPTS[2].text for body in server.requests)
    assert found[2].text is None
    assert reason in found[2].missing
    assert tries <= 2
    assert [found[i].text for i in (0, 1, 3)] == [f"You ask: {PROMPTS[i].text}" for i in (0, 1, 3)]


def test_an_empty_answer_is_an_answer_and_half_an_emoji_no_end() -> None:
    said = {PROMPTS[0].text: "", PROMPTS[1].text: "red \ud83d", PROMPTS[2].text: "\ud83d\ude00 \u00fc"}
    with Server(lambda body, times: message({"content": said.get(text_of(body), "x")})) as server:
        found = asked(served(server))
    assert [answer.text for answer in found[:3]] == ["", "red \ufffd", "😀 ü"]


@pytest.mark.parametrize("trouble", [error(429, "slow down"), error(503, "loading"), Reply(raw=b"not yet")])
def test_trouble_that_passes_costs_no_answer(trouble: Reply) -> None:
    script: Script = lambda body, times: trouble if times == 0 else echo(body, times)  # noqa: E731
    with Server(script) as server:
        assert all(answer.text for answer in asked(served(server)))


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (error(404, "The model `my-model` does not exist.", "model_not_found"), "no model 'my-model' there"),
        (error(401, "wrong key"), "refuses the key"),
    ],
)
def test_a_server_of_no_use_ends_it_at_once(reply: Reply, message: str) -> None:
    with Server(lambda body, times: reply) as server:
        with pytest.raises(LanguageModelError, match=message):
            asked(served(server))
        assert len(server.requests) <= 2


def test_nobody_there_ends_it_after_a_few_tries() -> None:
    with Server() as server:
        url = server.url
    answerer = EndpointAnswerer.greedy("m", url, attempts=2, backoff=0.01, concurrency=2)
    with pytest.raises(LanguageModelError, match=r"10 requests in a row failed.*connection to http://127\.0\.0\.1"):
        asked(answerer, [Prompt(f"Q{n}") for n in range(40)])


def test_whoever_stops_listening_stops_the_requests() -> None:
    with Server(lambda body, times: Reply(content="x", delay=0.02)) as server:
        stream = served(server).answers([Prompt(f"Q{n}") for n in range(500)], range(500))
        next(stream)
        stream.close()  # type: ignore[attr-defined]
        assert len(server.requests) < 20


def test_broken_pictures_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"a\.png: not a whole picture"):
        data_url(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"b\.png: no such picture"):
        data_url(tmp_path / "b.png")
