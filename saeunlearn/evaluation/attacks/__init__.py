"""Attacks: ways in which a third party would try to get the forgotten knowledge back, measured against an oracle."""

from .battery import ATTACKS, attack

__all__ = ["ATTACKS", "attack"]
