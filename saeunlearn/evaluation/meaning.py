"""What the JSON of an evaluation means. Without PyTorch, so that what only shows results starts quickly."""

from __future__ import annotations

import math
from typing import Any

METRICS = {"multiple_choice": "multiple choice", "cloze": "cloze", "nll": "NLL (nats per token)"}


def is_forget(group: str) -> bool:
    """Whether low scores are the aim in this group of questions or text corpus."""
    return group.split("/")[0] == "forget"


def is_number(value: Any) -> bool:
    """Whether it is a finite number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
