"""What a removal report does not claim: sentences that depend on what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..methods import RECOMMENDED

HIDDEN = 0.25  # recovered share beyond which it is said that knowledge was hidden
WEIGHT_KINDS = {"weight_delta", "token"}


def not_claimed(
    run: Mapping[str, Any],
    kinds: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    attacks: Mapping[str, Any] | None,
    selected: bool,
    judged: bool,
) -> list[str]:
    """`kinds`: part kinds of the Erasure; `rows`: of evaluation.json's comparison; `attacks`: None if none was made;
    `selected`: whether features were chosen; `judged`: whether the oracle answered the questions of the run."""
    out = []
    if run.get("status") != "done":
        out.append("The run is not recorded as done, so everything here may be incomplete.")
    if kinds and not set(kinds) & WEIGHT_KINDS:
        out.append("Nothing was removed from the weights. This Erasure acts while the model runs: whoever holds the "
                   "checkpoint can leave it out and has all of the knowledge.")  # fmt: skip
    elif set(kinds) - WEIGHT_KINDS:
        out.append("A part of this Erasure acts while the model runs and removes nothing from the weights.")
    if kinds:
        out.append("Not that the way back is closed: the Erasure can be reversed by whoever holds it and the edited "
                   "model.")  # fmt: skip
    out.append("Nothing about the original checkpoint and other copies of it: they still hold the knowledge.")
    out += _attack_claims(attacks, (run.get("config") or {}).get("method"))
    if judged:
        out.append("Not that the model equals the retrained one (oracle): they were compared on the questions of the "
                   "run and under attack, not on running text.")  # fmt: skip
    elif not (attacks and (attacks.get("levels") or {}).get("oracle")):
        out.append("Not that the model equals one that never saw the forget set: no such retrained model (oracle) "
                   "was measured beside it.")  # fmt: skip
    else:
        out.append("Not that the model equals the retrained one (oracle): they were compared on the attack's "
                   "questions only.")  # fmt: skip
    metrics = {r.get("metric") for r in rows}
    if not rows:
        out.append("Nothing about what was forgotten or kept: it was not measured.")
    elif metrics == {"nll"}:
        out.append("Not that answers can no longer be found: no questions were given, and a higher loss on the "
                   "forget text does not show it.")  # fmt: skip
    elif "nll" not in metrics:
        out.append("Nothing about running text: no texts were measured.")
    if rows:
        out.append("Nothing beyond the questions and texts named here: other wordings, languages and tasks were not "
                   "measured.")  # fmt: skip
        out.append("The intervals are over records. They do not cover the choice of the seed, of which one was run.")
    if selected:
        out.append("Not that the chosen features are all that carries the topic: they were chosen by their activity "
                   "on the forget and retain texts.")  # fmt: skip
    return out


def _attack_claims(attacks: Mapping[str, Any] | None, method: Any) -> list[str]:
    if attacks is None:
        return ["Not attacked: neither relearning on a part of the forget set, nor quantisation, nor prompting, nor a "
                "search in the activations was tried. Methods of this kind are known to give back much of what they "
                "removed when fine-tuned for a few steps."]  # fmt: skip
    if not attacks["this_erasure"]:
        return ["The attacks in attacks.json were not made on this Erasure, so they say nothing about it."]
    out = ["Not that it stands under other attacks, or under these with a larger budget than the one named."]
    if not attacks["attacks"]:
        out.append("No attack is recorded in attacks.json: it was not attacked.")
    if (attacks["headline"]["recovered"] or 0) > HIDDEN and method != RECOMMENDED:
        out.append("Not that what the worst attack brought back was removed: it was hidden. The method "
                   f"{RECOMMENDED} is the one made to withstand this.")  # fmt: skip
    if attacks["levels"]["oracle"] is None:
        out.append("Recovery under attack has no oracle beside it: what a model that never knew would learn from the "
                   "same attack is not subtracted.")  # fmt: skip
    return out
