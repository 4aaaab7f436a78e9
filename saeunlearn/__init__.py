"""saeunlearn: take chosen knowledge out of a language model through its SAE features, and prove it."""

__version__ = "0.1.0"
