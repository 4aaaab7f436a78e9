"""Bypass: take off what acts at inference. Whoever holds the weights can, and a guard or offset leaves all in them."""

from __future__ import annotations

from ...erasure import Erasure
from ...tokens import TokenPart, banned
from .case import Case, NotApplicable, Try, Victim

NOTE = (
    "guards and offsets change no weight: whoever holds the weights takes the hook off and has the original back, so "
    "they control access and remove nothing"
)


def bypass(case: Case, victim: Victim) -> list[Try]:
    """The model without each kind of hook, and with the token of the Erasure banned from decoding.

    An oracle has nothing to take off: it is scored as it is. Raises NotApplicable for an Erasure of weights alone.
    """
    if victim.erasure is None:
        return [Try({"removed": "nothing"}, case.score(victim.model).values)]
    tries = []
    for kind in ("guard", "offset"):
        rest = [p for p in victim.erasure.parts if p.kind != kind]
        if len(rest) < len(victim.erasure.parts):
            model = victim.base.copy()
            if rest:
                Erasure(rest, victim.erasure.manifest).apply(model, force=True)
            tries.append(Try({"removed": kind}, case.score(model).values, extra={"note": NOTE}))
    for part in victim.erasure.parts:
        if isinstance(part, TokenPart):
            with banned(victim.model, part.text):
                tries.append(Try({"banned": part.text}, case.score(victim.model).values))
    if not tries:
        raise NotApplicable("the Erasure is in the weights: there is no hook and no token to take off")
    return tries
