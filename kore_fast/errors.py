"""Errors that a user can act on: each names the file, item or layer, what was expected, and what to do."""

from __future__ import annotations


class KoreError(Exception):
    """Base of every error that kore_fast raises on purpose; the command line prints it without a traceback."""


class DataError(KoreError):
    """An item, sample, question or image is not usable as given."""


class RecipeError(KoreError):
    """A recipe has an unknown key, a wrong value, or asks for something that is not there."""


class StoreError(KoreError):
    """A covariance store does not fit the model, the layers or the other store."""


class ConstraintError(KoreError):
    """The constraint cannot be built or no longer holds: rank, activations, weight decay, dropout, a changed A."""


class LanguageModelError(KoreError):
    """A language model cannot be reached or used at all; what it answered before is in the request cache."""


class BackendError(KoreError):
    """A backend of an operation was asked for that does not exist or can't run here."""
