"""Typed errors: each says what is wrong, where, and what would be right, before any long work starts."""

from __future__ import annotations


class SaeunlearnError(Exception):
    """Base of every error that the toolkit raises on purpose; the CLI prints its message without a traceback."""


class CorpusError(SaeunlearnError):
    """A forget, retain or question file is empty, unreadable or of an unknown shape."""


class OverlapError(CorpusError):
    """Forget and retain sets share records, so no edit could satisfy both."""


class ModelError(SaeunlearnError):
    """A model cannot be opened, has an unsupported layout, or refuses what is asked of it."""


class TokenizerMismatchError(ModelError):
    """The tokenizer produces ids that the model has no embedding for."""


class SAEMismatchError(SaeunlearnError):
    """An SAE's width, hook point or fit does not match the layer it is used on."""


class SelectionError(SaeunlearnError):
    """The features asked for cannot be chosen: K exceeds the candidates, the live features or the width."""


class ConfigError(SaeunlearnError):
    """A setting is outside its range, or a method lacks something that it needs."""


class NonFiniteError(SaeunlearnError):
    """NaN or infinity in activations, statistics or a loss."""


class ErasureError(SaeunlearnError):
    """An Erasure directory is damaged, foreign to the model, or cannot do what is asked."""


class RunError(SaeunlearnError):
    """A run directory is unusable: foreign, locked by other settings, or on a full disk."""


class VerificationError(SaeunlearnError):
    """A run directory is not what its report says."""


class Cancelled(SaeunlearnError):
    """The user cancelled; nothing was changed."""
