"""The CLIP filter: which of the pictures found are like an item's own, and which fit a text; every score is kept.

Vectors are computed by open_clip in batches and kept in a cache, keyed by model, weights and the picture's SHA-256. A
second run, and a machine without open_clip, reads them from there.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import sqlite3
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, StrictStr, model_validator

from kore_fast.data.images import IMAGE_FORMATS, MAX_PIXELS
from kore_fast.errors import DataError
from kore_fast.files import sha256_file

T = TypeVar("T")
Kind = Literal["picture", "text"]

_LOCAL_FOLDER = "local-dir:"
_HUB = "hf-hub:"
_WEIGHT_FILES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".npz")


class ClipOptions(BaseModel):
    """Which CLIP model judges pictures, and how many it keeps."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: StrictStr = "ViT-L-14-336"
    """open_clip's name of the architecture; or ``local-dir:FOLDER`` (``open_clip_config.json`` beside one
    ``.safetensors``), or ``hf-hub:OWNER/NAME``; both of these bring their weights, and ``pretrained`` is not read."""
    pretrained: StrictStr = "openai"
    """open_clip's name of the weights, fetched from the hub, or the path of a ``.safetensors`` file."""
    quick_gelu: bool | None = None
    """Whether the weights were trained with QuickGELU. None: what open_clip knows about the named weights. OpenAI's
    need it: say True when they come from a file."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Pictures (or texts) embedded at once; as many are decoded and held at a time."""
    device: StrictStr = "auto"
    """"auto" is CUDA where there is a GPU, else the CPU."""
    keep: Annotated[int, Field(ge=1)] = 2
    """Pictures kept for recognition and caption (2 in the paper)."""
    of: Annotated[int, Field(ge=1)] = 5
    """How many of the pictures found are looked at, in the search's order (5 in the paper)."""
    identical: Annotated[float, Field(ge=0, lt=1)] = 1e-3
    """A picture whose similarity is at least 1 − this counts as the same picture, saved again. One with the same bytes
    always does. The paper leaves out a similarity of just 1."""
    unfiltered: bool = False
    """Go on without CLIP: pictures are kept in the search's order, without scores, and the data card says so."""

    @model_validator(mode="after")
    def _keeps_some_of_those(self) -> ClipOptions:
        if self.keep > self.of:
            raise ValueError(f"'keep' is {self.keep} but only 'of' = {self.of} pictures are looked at; lower one")
        return self


@dataclass(frozen=True)
class Scored:
    """A candidate with its picture's hash and what CLIP says about it."""

    path: Path
    sha256: str
    score: float | None
    """Cosine similarity, rounded to 4 places; None when unfiltered."""


@dataclass(frozen=True)
class Dropped:
    """A candidate that was not kept, and why."""

    path: Path
    reason: str
    score: float | None = None


@dataclass(frozen=True)
class Choice:
    """What became of an item's candidates: best first, and the rest in the search's order."""

    kept: tuple[Scored, ...]
    dropped: tuple[Dropped, ...]


@dataclass(frozen=True)
class Unknown:
    """One batch whose vectors are not in the cache."""

    kind: Kind
    keys: tuple[str, ...]
    values: tuple[str, ...]
    """Paths of pictures, or texts."""


class Clip:
    """Scores pictures against pictures and texts.

    The model is loaded when a vector is not in the cache, and never otherwise. A vector once in the cache stays, so
    whatever is chosen with one cache is always chosen the same. A fresh cache filled by the same calls (same batches)
    on the same machine holds the same bytes, also when it was killed on the way; with other batches or on another
    device vectors differ by rounding, which scores of 4 places hide but for ties and borders. Equal scores are ordered
    by the pictures' hashes.

    Args:
        options: model, weights, sizes.
        cache: a folder for ``clip.sqlite``; several processes may share it.

    Raises:
        DataError: the cache is not usable; no weights (what was tried, and the two ways on); open_clip is missing.
    """

    def __init__(self, options: ClipOptions | None, cache: str | Path) -> None:
        self.options = options or ClipOptions()
        self._cache = _Cache(Path(cache) / "clip.sqlite")
        self._identity: str | None = None
        self._loaded: _Model | None = None

    def warm(self, pictures: Iterable[str | Path] = (), texts: Iterable[str] = ()) -> dict[Path, str]:
        """Put the vectors of many pictures and texts into the cache, in full batches.

        `closest` and `best_for_text` do the same for one item; this fills a GPU. Memory holds one batch whatever the
        number of pictures. Nothing is done when unfiltered.

        Returns:
            The pictures that cannot be read, each with the reason.
        """
        problems: dict[Path, str] = {}
        if self.options.unfiltered:
            return problems
        for batch in _batches(map(Path, pictures), self.options.batch_size):
            hashes = {}
            for path in batch:
                try:
                    hashes[path] = _hash(path)
                except DataError as error:
                    problems[path] = str(error)
            _, broken = self._picture_vectors(hashes)
            problems |= broken
        for several in _batches(texts, self.options.batch_size):
            self._text_vectors(several)
        return problems

    def unknown(self, pictures: Iterable[str | Path] = (), texts: Iterable[str] = ()) -> Iterator[Unknown]:
        """The batches that `warm` would compute now, in its order, for another process to compute.

        Pictures that cannot be read are passed over.
        """
        if self.options.unfiltered:
            return
        seen: set[str] = set()
        for batch in _batches(map(Path, pictures), self.options.batch_size):
            hashes = {}
            for path in batch:
                with suppress(DataError):
                    hashes[path] = _hash(path)
            known = seen | self._cache.read(self.weights, "picture", hashes.values()).keys()
            if waiting := list(_waiting(hashes, known)):
                seen.update(key for key, _ in waiting)
                yield Unknown("picture", tuple(key for key, _ in waiting), tuple(str(path) for _, path in waiting))
        seen = set()
        for several in _batches(texts, self.options.batch_size):
            keys = {_text_key(text): text for text in several}
            known = seen | self._cache.read(self.weights, "text", keys).keys()
            if new := {key: text for key, text in keys.items() if key not in known}:
                seen.update(new)
                yield Unknown("text", tuple(new), tuple(new.values()))

    def compute(self, kind: Kind, contents: dict[str, Any]) -> dict[str, np.ndarray]:
        """Vectors of one batch by key, not kept: of texts, or of pictures' bytes; without what cannot be decoded."""
        model = self._model()
        if kind == "text":
            return dict(zip(contents, model.texts(list(contents.values())), strict=True))
        decoded = {}
        for key, data in contents.items():
            with suppress(DataError):
                decoded[key] = model.prepare(_decode(io.BytesIO(data)))
        return dict(zip(decoded, model.pictures(list(decoded.values())), strict=True)) if decoded else {}

    def adopt(self, kind: Kind, vectors: dict[str, np.ndarray]) -> None:
        """Keep vectors that another process computed with the same `weights`; those that are there stay."""
        self._cache.write(self.weights, kind, vectors)

    def closest(self, own: str | Path, candidates: Sequence[str | Path]) -> Choice:
        """Of the first ``options.of`` candidates, the ``options.keep`` most similar to ``own``, but not it itself.

        Raises:
            DataError: ``own`` cannot be read. A candidate that cannot be is dropped with the reason.
        """
        own = Path(own)
        own_hash = _hash(own)
        seen, dropped = self._readable(candidates, {own_hash: "the item's own picture"})
        if self.options.unfiltered:
            return _choice(candidates, [Scored(path, key, None) for path, key in seen.items()], dropped, self._keep())
        vectors, broken = self._picture_vectors({own: own_hash, **seen})
        if own in broken:
            raise DataError(broken[own])
        dropped |= {path: Dropped(path, reason) for path, reason in broken.items()}
        scored = []
        for path, key in seen.items():
            if path in broken:
                continue
            score = _similarity(vectors[own_hash], vectors[key])
            if score >= 1 - self.options.identical:
                dropped[path] = Dropped(path, "the item's own picture, saved again", score)
            else:
                scored.append(Scored(path, key, score))
        scored.sort(key=lambda one: (-(one.score or 0.0), one.sha256))
        distinct: list[Scored] = []
        for one in scored:
            twin = next((other for other in distinct if self._same(vectors[one.sha256], vectors[other.sha256])), None)
            if twin is None:
                distinct.append(one)
            else:
                dropped[one.path] = Dropped(one.path, f"{twin.path.name}, saved again", one.score)
        return _choice(candidates, distinct, dropped, self._keep())

    def best_for_text(self, text: str, candidates: Sequence[str | Path], *, keep: int = 1) -> Choice:
        """Of the first ``options.of`` candidates, the ``keep`` that fit ``text`` best (for VQA: subject and hypernym).

        A text longer than the model's context (77 tokens for OpenAI's) is cut by open_clip.
        """
        seen, dropped = self._readable(candidates, {})
        if self.options.unfiltered:
            return _choice(candidates, [Scored(path, key, None) for path, key in seen.items()], dropped, keep)
        vectors, broken = self._picture_vectors(seen)
        dropped |= {path: Dropped(path, reason) for path, reason in broken.items()}
        if not vectors:
            return _choice(candidates, [], dropped, keep)
        wanted = self._text_vectors([text])[0]
        scored = [
            Scored(path, key, _similarity(wanted, vectors[key])) for path, key in seen.items() if path not in broken
        ]
        scored.sort(key=lambda one: (-(one.score or 0.0), one.sha256))
        return _choice(candidates, scored, dropped, keep)

    def card(self) -> dict[str, Any]:
        """What the data card says about the filter; plain JSON values."""
        options = self.options
        if options.unfiltered:
            return {"filtered": False, "note": "pictures were taken in the search's order, not scored by CLIP"}
        named = options.model if _brings_weights(options.model) else f"{options.model}, {options.pretrained}"
        return {
            "filtered": True,
            "model": named if _weights_file(options) is None else options.model.partition(":")[0],
            "weights": self.weights,
            "keep": options.keep,
            "of": options.of,
            "identical": options.identical,
        }

    def close(self) -> None:
        """Close the cache and let go of the model."""
        self._cache.close()
        self._loaded = None

    def __enter__(self) -> Clip:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _keep(self) -> int:
        return self.options.keep

    def _same(self, one: np.ndarray, other: np.ndarray) -> bool:
        return _similarity(one, other) >= 1 - self.options.identical

    @property
    def weights(self) -> str:
        """The name under which vectors are kept: model and weights, without a path."""
        if self._identity is None:
            self._identity = _identity(self.options, self._cache)
        return self._identity

    def _model(self) -> _Model:
        if self._loaded is None:
            self._loaded = _load(self.options)
        return self._loaded

    def _readable(
        self, candidates: Sequence[str | Path], known: dict[str, str]
    ) -> tuple[dict[Path, str], dict[Path, Dropped]]:
        """Hashes of the candidates that are looked at, each picture once; and the others with the reason."""
        seen: dict[Path, str] = {}
        dropped: dict[Path, Dropped] = {}
        reasons = dict(known)
        paths = list(dict.fromkeys(map(Path, candidates)))
        for path in paths[: self.options.of]:
            try:
                key = _hash(path)
            except DataError as error:
                dropped[path] = Dropped(path, str(error))
                continue
            if key in reasons:
                dropped[path] = Dropped(path, reasons[key])
            else:
                seen[path] = key
                reasons[key] = f"{path.name} once more"
        for path in paths[self.options.of :]:
            dropped[path] = Dropped(path, f"not among the first {self.options.of}")
        return seen, dropped

    def _picture_vectors(self, hashes: dict[Path, str]) -> tuple[dict[str, np.ndarray], dict[Path, str]]:
        """Vectors by hash; and what cannot be decoded."""
        if not hashes:
            return {}, {}
        vectors = self._cache.read(self.weights, "picture", hashes.values())
        broken: dict[Path, str] = {}
        for batch in _batches(_waiting(hashes, vectors), self.options.batch_size):
            # Outside of what is caught: weights that are not there are not the picture's fault.
            model, decoded = self._model(), {}
            for key, path in batch:
                try:
                    decoded[key] = model.prepare(_decode(path))
                except DataError as error:
                    broken |= {other: str(error) for other, its in hashes.items() if its == key}
            if decoded:
                rows = model.pictures(list(decoded.values()))
                vectors |= self._cache.write(self.weights, "picture", dict(zip(decoded, rows, strict=True)))
        return vectors, broken

    def _text_vectors(self, texts: Sequence[str]) -> list[np.ndarray]:
        keys = {text: _text_key(text) for text in texts}
        vectors = self._cache.read(self.weights, "text", keys.values())
        for batch in _batches((text for text in keys if keys[text] not in vectors), self.options.batch_size):
            rows = self._model().texts(batch)
            found = {keys[text]: row for text, row in zip(batch, rows, strict=True)}
            vectors |= self._cache.write(self.weights, "text", found)
        return [vectors[keys[text]] for text in texts]


def _choice(
    candidates: Sequence[str | Path], ranked: Sequence[Scored], dropped: dict[Path, Dropped], keep: int
) -> Choice:
    for one in ranked[keep:]:
        dropped[one.path] = Dropped(
            one.path, "others fit better" if one.score is not None else "enough were found before it", one.score
        )
    order = dict.fromkeys(map(Path, candidates))
    return Choice(tuple(ranked[:keep]), tuple(dropped[path] for path in order if path in dropped))


def _similarity(one: np.ndarray, other: np.ndarray) -> float:
    return round(float(one.astype(np.float64) @ other.astype(np.float64)), 4)


def _batches(values: Iterable[T], size: int) -> Iterator[list[T]]:
    waiting = iter(values)
    while batch := list(islice(waiting, size)):
        yield batch


def _hash(path: Path) -> str:
    try:
        return sha256_file(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); put the picture there") from None


def _text_key(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _waiting(hashes: dict[Path, str], known: Container[str]) -> Iterator[tuple[str, Path]]:
    """What is not known yet, each picture once."""
    waiting = {key: path for path, key in reversed(hashes.items()) if key not in known}
    yield from reversed(waiting.items())


def _decode(path: Path | io.BytesIO) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=IMAGE_FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise DataError(f"{path}: more than {MAX_PIXELS:,} pixels; make it smaller")
                return image.convert("RGB")
    except DataError:
        raise
    except Exception as error:  # decoders raise whatever a broken file leads them into, not only OSError
        raise DataError(f"{path}: not a whole picture ({error}); fetch it again or leave it out") from None


class _Cache:
    """Unit vectors in SQLite: a batch is there whole or not at all, whenever the process dies."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Used by one thread at a time, but not always by the one that opened it.
            self._base = sqlite3.connect(path, timeout=60, check_same_thread=False)
            with self._base:
                self._base.execute(
                    "CREATE TABLE IF NOT EXISTS vectors (weights TEXT, kind TEXT, key TEXT, vector BLOB NOT NULL, "
                    "PRIMARY KEY (weights, kind, key)) WITHOUT ROWID"
                )
                self._base.execute("CREATE TABLE IF NOT EXISTS files (file TEXT PRIMARY KEY, sha256 TEXT NOT NULL)")
        except (OSError, sqlite3.Error) as error:
            raise self._broken(error) from None

    def read(self, weights: str, kind: Kind, keys: Iterable[str]) -> dict[str, np.ndarray]:
        found = {}
        try:
            with closing(self._base.cursor()) as cursor:
                for key in keys:
                    cursor.execute(
                        "SELECT vector FROM vectors WHERE weights = ? AND kind = ? AND key = ?", (weights, kind, key)
                    )
                    if row := cursor.fetchone():
                        found[key] = np.frombuffer(row[0], dtype="<f4")
        except sqlite3.Error as error:
            raise self._broken(error) from None
        return found

    def write(self, weights: str, kind: Kind, vectors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Add vectors and return those that count: where another process was faster, its own."""
        rows = [(weights, kind, key, vector.astype("<f4").tobytes()) for key, vector in vectors.items()]
        try:
            with self._base:
                self._base.executemany("INSERT OR IGNORE INTO vectors VALUES (?, ?, ?, ?)", rows)
        except sqlite3.Error as error:
            raise self._broken(error) from None
        return self.read(weights, kind, vectors)

    def file_sha256(self, path: Path) -> str:
        """The SHA-256 of a file of some gigabytes, computed again only when its size or time has changed."""
        stat = path.stat()
        name = f"{path.resolve()}\n{stat.st_size}\n{stat.st_mtime_ns}"
        try:
            if row := self._base.execute("SELECT sha256 FROM files WHERE file = ?", (name,)).fetchone():
                return str(row[0])
            digest = sha256_file(path)
            with self._base:
                self._base.execute("INSERT OR REPLACE INTO files VALUES (?, ?)", (name, digest))
        except sqlite3.Error as error:
            raise self._broken(error) from None
        return digest

    def close(self) -> None:
        self._base.close()

    def _broken(self, error: Exception) -> DataError:
        return DataError(
            f"{self.path}: the cache of CLIP's vectors cannot be used ({error}); free some space or choose another "
            "folder; a damaged file may be deleted, its vectors are then computed again"
        )


@dataclass(frozen=True)
class _Model:
    """open_clip's model with its preprocessing and tokenizer."""

    prepare: Callable[[Image.Image], Any]
    """A picture as a (3, height, width) tensor."""
    pictures: Callable[[list[Any]], np.ndarray]
    """n prepared pictures as (n, d) float32 unit rows."""
    texts: Callable[[list[str]], np.ndarray]
    """n texts as (n, d) float32 unit rows."""


def _brings_weights(model: str) -> bool:
    return model.startswith((_LOCAL_FOLDER, _HUB))


def _weights_file(options: ClipOptions) -> Path | None:
    """The local file that weights come from, or None for names on the hub.

    Raises:
        DataError: there is no such file, or it is a pickle.
    """
    if options.model.startswith(_HUB):
        return None
    if options.model.startswith(_LOCAL_FOLDER):
        folder = Path(options.model.removeprefix(_LOCAL_FOLDER))
        if not (folder / "open_clip_config.json").is_file():
            raise _no_weights(options, f"the folder {folder}: it holds no open_clip_config.json")
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _WEIGHT_FILES[1:])
        found = sorted(folder.glob("*.safetensors"))
        if len(found) != 1 or pickles:
            names = [path.name for path in found] + pickles
            raise _no_weights(options, f"the folder {folder}: one .safetensors and no other weights, found {names}")
        return found[0]
    path = Path(options.pretrained)
    if not (path.is_file() or len(path.parts) > 1 or path.suffix in _WEIGHT_FILES):
        return None
    if not path.is_file():
        raise _no_weights(options, f"the file {path}: there is none")
    if path.suffix != ".safetensors":
        raise DataError(
            f"CLIP weights {path}: a {path.suffix or 'file without a suffix'} may be a pickle, which can run code and "
            'is not read; convert it once, where you trust it: python -c "import torch, safetensors.torch as s; '
            f"w = torch.load('{path}', weights_only=True); s.save_file({{k: v.contiguous() for k, v in "
            f"w.get('state_dict', w).items()}}, '{path.with_suffix('.safetensors')}')\""
        )
    return path


def _identity(options: ClipOptions, cache: _Cache) -> str:
    """What the vectors depend on, without a path: two places of one file are the same weights."""
    gelu = "" if options.quick_gelu is None else f", quick_gelu={options.quick_gelu}"
    path = _weights_file(options)
    if path is None:
        weights = "" if options.model.startswith(_HUB) else f", {options.pretrained}"
        return f"{options.model}{weights}{gelu}"
    model = options.model
    if model.startswith(_LOCAL_FOLDER):
        model = f"config {sha256_file(path.with_name('open_clip_config.json'))}"
    return f"{model}, sha256 {cache.file_sha256(path)}{gelu}"


def _load(options: ClipOptions) -> _Model:
    path = _weights_file(options)
    try:
        import open_clip  # and torchvision, whose operators `import kore_fast` has seen to
        import torch
    except ImportError as error:
        raise DataError(
            f'the CLIP filter needs open_clip ({error}): pip install "kore-fast[clip]"; or set unfiltered: true to '
            "keep pictures in the search's order, without scores"
        ) from None
    if not _brings_weights(options.model) and options.model.replace("/", "-") not in open_clip.list_models():
        close = difflib.get_close_matches(options.model, open_clip.list_models(), n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "open_clip.list_models() names them all"
        raise DataError(f"CLIP model {options.model!r}: open_clip does not know it; {hint}")
    quick_gelu = options.quick_gelu
    if quick_gelu is None and path is None and not _brings_weights(options.model):
        # open_clip only warns when named weights want another activation than the model's name says.
        quick_gelu = bool(open_clip.get_pretrained_cfg(options.model, options.pretrained).get("quick_gelu"))
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model, preprocess = open_clip.create_model_from_pretrained(
            options.model,
            pretrained=None if _brings_weights(options.model) else str(path or options.pretrained),
            device=device,
            force_quick_gelu=bool(quick_gelu),
        )
        tokenizer = open_clip.get_tokenizer(options.model)
    except Exception as error:  # the hub, the file and the device each raise errors of their own
        tried = f"the file {path}" if path else "the hub, and what an earlier download left on this machine"
        said = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise _no_weights(options, f"{tried}: {said}") from error
    model.eval()

    def run(encode: Callable[..., Any], inputs: Any) -> np.ndarray:
        with torch.inference_mode():
            rows = encode(inputs.to(device), normalize=True).float().cpu().numpy()
        if not np.isfinite(rows).all():
            raise DataError(f"CLIP model {options.model!r} gives values that are not finite; its weights are damaged")
        return np.asarray(rows, dtype=np.float32)

    return _Model(
        prepare=preprocess,
        pictures=lambda prepared: run(model.encode_image, torch.stack(prepared)),
        texts=lambda texts: run(model.encode_text, tokenizer(texts)),
    )


def _no_weights(options: ClipOptions, tried: str) -> DataError:
    return DataError(
        f"CLIP model {options.model!r}, weights {options.pretrained!r}: cannot be loaded. Tried {tried}. Either give "
        "'pretrained' the path of a .safetensors file, or set 'unfiltered: true': pictures are then kept in the "
        "search's order, without scores, and the data card says so"
    )
