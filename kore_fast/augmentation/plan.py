"""Everything that an augmentation may be told: what is written, by whom, with which pictures, and what comes out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from kore_fast.augmentation.clip import ClipOptions
from kore_fast.augmentation.cluster import RayOptions
from kore_fast.augmentation.grounding import GroundingOptions
from kore_fast.augmentation.images.options import ImageSearchOptions
from kore_fast.augmentation.language.options import LanguageModelOptions
from kore_fast.augmentation.options import AugmentationOptions

FormatName = Literal["llama-factory", "swift", "messages", "parquet"]

_HOW: dict[str, set[str] | bool] = {
    "language_model": {
        "api_key_env", "attempts", "backoff", "longest_wait", "timeout", "concurrency", "requests_per_minute",
        "tokens_per_minute", "batch_api", "batch_requests", "batch_bytes", "batch_poll",
    },
    "image_search": {
        "contact", "key_env", "timeout", "concurrency", "per_host", "requests_per_minute", "retries", "backoff",
        "patience",
    },
    "clip": {"batch_size", "device"},
    "ray": True,
}  # fmt: skip
"""Options that say how fast, how patiently, where and by whose key the caches are filled, but not what is written. What
a server did not answer in time is asked again by the next run whatever these are."""


class AugmentationPlan(AugmentationOptions):
    """`AugmentationOptions`, and the parts of the pipeline beside the template writer."""

    language_model: LanguageModelOptions | None = None
    """Writes dialogues, captions and VQA; without it templates do."""
    image_search: ImageSearchOptions | None = None
    """Finds pictures for recognition, captions and VQA; without it every sample shows its item's own picture."""
    clip: ClipOptions | None = None
    """Chooses among found pictures. With ``image_search`` it is needed; ``{unfiltered: true}`` goes on without it."""
    grounding: GroundingOptions | None = None
    """Checks what was written against the item's text. Default: with a language model yes, else no."""
    ray: RayOptions | None = None
    """Requests, downloads and CLIP's vectors by workers of Ray, on one machine or many; the output is the same."""
    formats: tuple[FormatName, ...] = ()
    """Other formats to write the samples in, beside LLaVA's."""
    skip_bad_items: bool = False
    """Leave items out that cannot be used, and report each; default: an error that lists them."""
    contact_sheet: Annotated[int, Field(ge=0, le=500)] = 24
    """Samples of each branch on the contact sheet."""

    @model_validator(mode="after")
    def _consistent(self) -> AugmentationPlan:
        if self.clip is not None and self.image_search is None:
            raise ValueError("'clip' chooses among found pictures: it needs 'image_search' beside it")
        if self.grounding is not None and self.grounding.judge != "off" and self.language_model is None:
            raise ValueError("grounding.judge needs a 'language_model' beside it")
        return self

    @property
    def checks(self) -> GroundingOptions | None:
        """The grounding check in force."""
        return self.grounding or (GroundingOptions() if self.language_model is not None else None)

    def decisive(self) -> dict[str, Any]:
        """The options on which the samples and their card depend; plain JSON values."""
        return self.model_dump(mode="json", exclude=_HOW)

    def files(self) -> list[Path]:
        """Files and folders, of a resolved plan, on whose content the samples depend."""
        given = [
            self.language_model and self.language_model.prompts,
            self.image_search and self.image_search.folder,
            self.clip and not self.clip.unfiltered and self.clip.pretrained,
            self.grounding and self.grounding.embedding,
        ]
        paths = [Path(path) for path in given if path]
        return [path for path in paths if path.is_absolute() and path.exists()]

    def resolved(self, resolve: Callable[[str | Path], Path]) -> AugmentationPlan:
        """With its paths made absolute by ``resolve``; a name that is no path there stays one."""

        def moved(section: Any, *keys: str) -> Any:
            if section is None:
                return None
            paths = {key: value for key in keys if (value := getattr(section, key)) is not None}
            there = {key: resolve(value) for key, value in paths.items()}
            # Of weights by name there is no such file; of a folder that is missing the part itself speaks.
            kept = {key: path for key, path in there.items() if path.exists() or key not in ("pretrained", "model")}
            return section.model_copy(update={key: type(paths[key])(path) for key, path in kept.items()})

        return self.model_copy(
            update={
                "language_model": moved(self.language_model, "prompts"),
                "image_search": moved(self.image_search, "folder"),
                "clip": moved(self.clip, "pretrained", "model"),
                "grounding": moved(self.grounding, "embedding"),
            }
        )
