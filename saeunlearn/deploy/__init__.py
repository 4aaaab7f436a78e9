"""Erasures that act through hooks, attached to a plain Hugging Face model; imports nothing else of saeunlearn."""
