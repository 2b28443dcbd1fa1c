"""Items, samples and questions: the files in which knowledge comes in and training data goes out."""

from kore_fast.data.items import Item, load_items
from kore_fast.data.questions import Question, read_questions, write_questions
from kore_fast.data.samples import Sample, Turn, read_samples, stream_samples, validate_sample, write_samples

__all__ = [
    "Item",
    "Question",
    "Sample",
    "Turn",
    "load_items",
    "read_questions",
    "read_samples",
    "stream_samples",
    "validate_sample",
    "write_questions",
    "write_samples",
]
