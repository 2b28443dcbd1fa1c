"""Small local files of every benchmark in its own schema, with content of our own, and a judge on loopback."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from kore_fast.evaluation.lmms import Judge

COLOURS = ("red", "green", "blue", "yellow")
# MathVista's own, which say to its judge what is wanted.
VISTA_HINTS = (
    "Hint: Please answer the question requiring an integer answer and provide the final value, e.g., 1, 2, 3, at the "
    "end.",
    "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end.",
)


def picture(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (28, 28), colour).save(file, "PNG")
    return file.getvalue()


def in_base64(colour: str) -> str:
    return base64.b64encode(picture(colour)).decode()


def _jsonl(folder: Path, name: str, split: str, rows: list[dict[str, Any]]) -> None:
    (folder / name).mkdir(parents=True)
    for colour in COLOURS:
        (folder / name / f"{colour}.png").write_bytes(picture(colour))
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / name / f"{split}.jsonl").write_text(text, encoding="utf-8")


def _tsv(folder: Path, name: str, file: str, rows: list[dict[str, Any]]) -> None:
    (folder / name).mkdir(parents=True)
    with open(folder / name / file, "w", encoding="utf-8", newline="") as opened:
        writer = csv.DictWriter(opened, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)


def write_benchmarks(folder: Path) -> Path:
    """All 12 and EVOKE, two to six questions each."""
    pairs = [("color", "red"), ("color", "green"), ("code_reasoning", "blue")]
    _jsonl(
        folder,
        "mme",
        "test",
        [
            {
                "question_id": f"{category}/{colour}.png",
                "image": f"{colour}.png",
                "question": f"Is the {colour} square {asked} in {category}? Please answer yes or no.",
                "answer": "Yes" if asked == colour else "No",
                "category": category,
            }
            for category, colour in pairs
            for asked in (colour, "purple")
        ],
    )
    _jsonl(
        folder,
        "mmbench",
        "dev",
        [
            {
                "index": number,
                "question": f"Which colour has square {number}?",
                "hint": "nan",
                "answer": "ABCD"[number],
                "A": "red",
                "B": "green",
                "C": "blue",
                "D": "yellow",
                "category": "attribute_recognition",
                "image": in_base64(colour),
                "source": "made up",
                "L2-category": "finegrained_perception",
                "comment": "",
                "split": "dev",
            }
            for number, colour in enumerate(COLOURS)
        ],
    )
    _jsonl(
        folder,
        "seedbench2_plus",
        "test",
        [
            {
                "data_id": f"{colour}.png",
                "data_type": "Single Image",
                "data_source": "made up",
                "question_id": f"q{number}",
                "question": f"Which file is chart {number}?",
                "choice_A": "one.png",
                "choice_B": "two",
                "choice_C": "three",
                "choice_D": "four",
                "answer": "B",
                "question_image_type": ("chart", "map", "web")[number],
                "question_image_subtype": "1",
                "image": f"{colour}.png",
            }
            for number, colour in enumerate(COLOURS[:3])
        ],
    )
    _jsonl(
        folder,
        "scienceqa",
        "test",
        [
            {
                "image": f"{colour}.png",
                "question": f"What is square {number}?",
                "choices": ["a shape", "an animal"],
                "answer": number,
                "hint": "Squares have four corners." if number else "",
                "task": "closed choice",
                "grade": "grade2",
                "subject": "natural science",
                "topic": "shapes",
                "category": "Shapes",
                "skill": "Name shapes",
                "lecture": "",
                "solution": "",
            }
            for number, colour in enumerate(COLOURS[:2])
        ],
    )
    mmmu: list[dict[str, Any]] = [
        {
            "id": "validation_Art_1",
            "question": "Which colour has <image 1>, beside <image 2>?",
            "options": "['red', 'green']",
            "answer": "A",
            "question_type": "multiple-choice",
            "image_1": "red.png",
            "image_2": "green.png",
        },
        {
            "id": "validation_Math_2",
            "question": "How many corners has <image 1>?",
            "options": "[]",
            "answer": "4",
            "question_type": "open",
            "image_1": "blue.png",
        },
    ]
    common = {"explanation": "", "img_type": "['Other']", "topic_difficulty": "Easy", "subfield": "Drawing"}
    empty: dict[str, Any] = {f"image_{number}": None for number in range(1, 8)}
    _jsonl(folder, "mmmu", "validation", [{**empty, **common, **row} for row in mmmu])
    _jsonl(
        folder,
        "mia_bench",
        "test",
        [
            {
                "id": number,
                "image": f"{colour}.png",
                "instruction": f"Describe square {number} in one sentence, and rhyme.",
                "type": "made up",
                "num_of_component": 2,
                "components": ["one sentence", "a rhyme"],
                "component_weight": [5, 5],
                "component_type": ["length", "style"],
            }
            for number, colour in enumerate(COLOURS[:2])
        ],
    )
    vista = {
        "source": "made up",
        "category": "general-vqa",
        "context": "synthetic scene",
        "grade": "elementary school",
        "img_height": 28,
        "img_width": 28,
        "language": "english",
        "skills": ["arithmetic reasoning"],
        "split": "testmini",
        "task": "figure question answering",
    }
    _jsonl(
        folder,
        "mathvista",
        "testmini",
        [
            {
                "pid": "1",
                "question": "How many corners are there?",
                "image": "images/1.png",
                "decoded_image": "red.png",
                "choices": None,
                "unit": None,
                "precision": None,
                "answer": "4",
                "question_type": "free_form",
                "answer_type": "integer",
                "metadata": vista,
                "query": f"{VISTA_HINTS[0]}\nQuestion: How many corners are there?",
            },
            {
                "pid": "2",
                "question": "Which shape is it?",
                "image": "images/2.png",
                "decoded_image": "green.png",
                "choices": ["square", "circle"],
                "unit": None,
                "precision": None,
                "answer": "square",
                "question_type": "multi_choice",
                "answer_type": "text",
                "metadata": vista,
                "query": f"{VISTA_HINTS[1]}\nQuestion: Which shape is it?\nChoices:\n(A) square\n(B) circle",
            },
        ],
    )
    _jsonl(
        folder,
        "mathvision",
        "test",
        [
            {
                "id": str(number),
                "question": f"How much is {number} + 1, in <image1>?",
                "options": ["1", "2", "3", "4", "5"] if number == 1 else [],
                "image": f"images/{number}.jpg",
                "decoded_image": f"{colour}.png",
                "answer": "B" if number == 1 else str(number + 1),
                "solution": None,
                "level": 1,
                "subject": "arithmetic",
            }
            for number, colour in enumerate(COLOURS[:3], start=1)
        ],
    )
    _jsonl(
        folder,
        "pope",
        "test",
        [
            {
                "id": str(number),
                "question_id": str(number),
                "question": f"Is there a {thing} in picture {number}?",
                "answer": "yes" if thing == "square" else "no",
                "image_source": "made up",
                "image": f"{COLOURS[number % 4]}.png",
                "category": "random",
            }
            for number, thing in enumerate(["square", "square", "square", "cow", "goat", "hen"])
        ],
    )
    _jsonl(
        folder,
        "hallusionbench",
        "image",
        [
            {
                "category": category,
                "subcategory": "figure",
                "visual_input": "1",
                "set_id": "0",
                "figure_id": figure,
                "sample_note": "square",
                "question_id": question,
                "question": f"Is figure {figure} of {category} {what}?",
                "gt_answer_details": f"Figure {figure} is {what}.",
                "gt_answer": "1",
                "filename": "square.png",
                "image": "red.png",
            }
            for category, figure, question, what in (
                ("VD", "0", "0", "red"),
                ("VD", "0", "1", "square"),
                ("VD", "1", "0", "green"),
                ("VS", "1", "0", "flat"),
            )
        ],
    )
    _tsv(
        folder,
        "ocrvqa",
        "OCRVQA_TESTCORE.tsv",
        [
            # The second question is about the first one's cover: VLMEvalKit's way of not writing a picture twice.
            {"index": "0", "image": in_base64("red"), "question": "Who wrote the red book?", "answer": "['Ann Reed']"},
            {"index": "1", "image": "0", "question": "What is the red book's kind?", "answer": "Travel"},
            {"index": "2", "image": in_base64("blue"), "question": "Is the blue book old?", "answer": "No"},
        ],
    )
    _tsv(
        folder,
        "mmdu",
        "MMDU.tsv",
        [
            {
                "index": "0",
                "image": str([in_base64("red"), in_base64("green"), in_base64("blue")]),
                "question": str(
                    ["What are <ImageHere> and <ImageHere>?", "What joins them?", "And how does <ImageHere> fit in?"]
                ),
                "answer": str(["A red and a green square.", "Their shape.", "It is a blue square."]),
            },
            {
                "index": "1",
                "image": str([in_base64("yellow")]),
                "question": str(["What is <ImageHere>?"]),
                "answer": str(["A yellow square."]),
            },
        ],
    )
    _jsonl(
        folder,
        "evoke",
        "evoke_evaluation_data",
        [
            {
                "question_id": "1",
                "image": "red.png",
                "text": "Who built the bridge in the picture?",
                "answer": "Ada Orrery",
                "type": "bridge",
                "cnn_wiki_type": "entity",
            },
            {
                "question_id": "2",
                "image": "blue.png",
                "text": "When did the ferry in the picture sink?",
                "answer": "in March 2025",
                "type": "accident",
                "cnn_wiki_type": "news",
            },
        ],
    )
    return folder


@pytest.fixture(scope="session")
def benchmark_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_benchmarks(tmp_path_factory.mktemp("benchmarks"))


GRADES = {
    "Creativity": 3,
    "Richness": 4,
    "Visual Perception": 5,
    "Logical Coherence": 6,
    "Answer Accuracy": 7,
    "Image Relationship Understanding": 8,
}


def judge_by_rule(prompt: str) -> str:
    """What a judge would say, by the task that it is given."""
    if "Image Relationship Understanding" in prompt:
        answer = prompt.rpartition("<answer>\n")[2].partition("\n</answer>")[0]
        overall = 9 if "square" in answer else 2
        return f"It is so so.\n{json.dumps(GRADES | {'Overall Score': overall})}"
    if "score of component 1" in prompt:
        return "score of component 1: 4/5, score of component 2: 3/5, total score: 7/10. It does not rhyme."
    if "intelligent teacher" in prompt:
        reference = prompt.partition("\nReference answer: ")[2].partition("\nPrediction answer:")[0]
        return "correct" if reference in prompt.partition("\nPrediction answer:")[2] else "incorrect"
    assert "Extracted answer:" in prompt
    said = prompt.rpartition("\n\nExtracted answer:")[0].rpartition("\n\n")[2]
    found = re.search(r"\d+|\([AB]\)", said)
    return found[0] if found else "none"


class LoopbackJudge:
    """An OpenAI-compatible endpoint with a script."""

    def __init__(self) -> None:
        self.script: Callable[[str], str | int] = judge_by_rule
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(payload)
                outer.keys.add(self.headers.get("Authorization"))
                said = outer.script(payload["messages"][-1]["content"])
                if self.path != "/v1/chat/completions":
                    said = 404
                if isinstance(said, int):
                    body = f"no, with {self.headers.get('Authorization')}".encode()
                    self.send_response(said)
                else:
                    message = {"role": "assistant", "content": said}
                    body = json.dumps({"model": payload["model"], "choices": [{"message": message}]}).encode()
                    self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.base_url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def options(self, model: str = "teacher", **more: Any) -> Judge:
        return Judge(base_url=self.base_url, model=model, **more)


@pytest.fixture
def loopback_judge() -> Iterator[LoopbackJudge]:
    judge = LoopbackJudge()
    yield judge
    judge.server.shutdown()
    judge.server.server_close()
