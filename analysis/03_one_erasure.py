# %% [markdown]
# # 3 · One Erasure, taken apart
#
# What did the demo's Erasure change: which weights, along which features, in which layers and subspaces of the
# stream, and what do the layers say afterwards? One run, one seed.

# %%
import os
from pathlib import Path

from saeunlearn import demo, figures, figures_diff, figures_erasure, figures_features, open_run
from saeunlearn.explore.compare import compare_view
from saeunlearn.explore.opened import ORIGINAL
from saeunlearn.explore.taken_apart import answers_by_layer, stream_changes, weight_changes

FAST = os.environ.get("SAEUNLEARN_NOTEBOOKS") == "fast"  # a tiny world, for the tests
RUNS = Path("../runs/analysis-fast" if FAST else "../runs/analysis")

# %%
box = demo.world(tiny=FAST)
run = open_run(demo.runs(RUNS, box)["sspu"][0])

# %% tags=["picture-before_after"]
figures.before_after(run.documents["evaluation"]["comparison"])

# %% [markdown]
# That is what it achieved. How it was trained, and what the retention budget (the limit on the retain loss) allowed:

# %%
erasure = run.erasures["sspu"]
figures.training_curves(erasure.manifest["losses"])

# %% [markdown]
# ## The weights
#
# The hard form writes W = W₀ + U_rel B: by construction all of the change lies in the span of the relevant rows,
# wherever it was trained. The control says how much of it *random* features of the same number would have caught.

# %%
changes = weight_changes(run, "sspu")
figures_diff.weight_shares(changes)

# %% [markdown]
# Feature by feature: the part of the change along each decoder row, relative to what a random direction has.

# %%
figures_erasure.weights_by_feature(changes["by_feature"], changes["relevant"])

# %%
ranked = sorted(range(len(changes["by_feature"])), key=lambda j: -changes["by_feature"][j])
inside = sum(j in changes["relevant"] for j in ranked[: len(changes["relevant"])])
print(f"of the {len(changes['relevant'])} features with most of the change, {inside} are relevant ones")
print(f"rank {changes['rank']} of d = {run.model.d_model}; change outside what writes to the stream: "
      f"{changes['elsewhere']:.1%}")  # fmt: skip

# %% [markdown]
# Rows that are not among the relevant ones get a share too: they are not orthogonal to them (notebook 2).
#
# ## The stream
#
# The change Δh after every block, on each text of the run: how large, and how it divides into the relevant subspace,
# the irrelevant one and the rest. The directions are those of the selection's layer; below and above it a share only
# says how much of the change lies along them.

# %%
moved = stream_changes(run, "sspu", records=16 if FAST else 64)
figures_erasure.stream_changes(moved)

# %%
for r in moved:
    if r["layer"] == run.selection.layer:
        t = r["total"]
        where = "unchanged" if r["relevant"] is None else f"{r['relevant']['mean']:.0%} of it relevant"
        print(f"{r['text']:7} ‖Δh‖²/‖h‖² = {t['mean']:.3f} ({t['low']:.3f} … {t['high']:.3f}), {where}")

# %% [markdown]
# Weights inside the subspace do not keep the *stream* inside: later blocks react to the change, in directions of
# their own. Where the push is strong it drowns everything else; look at the text where little changes.
#
# ## What the layers say
#
# Logit lens: the model's own final norm and output matrix read the stream after every block. First one question, and
# then all forget questions, as multiple choice.

# %%
question = run.questions.where(set="forget").records[0]
seen = compare_view(run, question.question, ["sspu"], [question.answer])
figures_erasure.lens(seen["models"])

# %%
for name, model in seen["models"].items():
    (answer,) = model["answers"]
    print(f"{name:9} p({answer['text']!r}) = {answer['probability']:.3f}   {question.question} …{model['generated']}")

# %%
asked = run.questions.where(set="forget").sample(200, 0)
read = [{**r, "series": r["model"], "value": r["mean"]} for r in answers_by_layer(run, [ORIGINAL, "sspu"], asked)]
figures_features.scores_along(read, "layer", "Forget questions, read off by the logit lens")

# %%
best = {n: max((r for r in read if r["model"] == n), key=lambda r: r["mean"]) for n in (ORIGINAL, "sspu")}
for name, r in best.items():
    interval = f"{r['low']:.2f} … {r['high']:.2f}"
    above = "above" if r["low"] > r["chance"] else "not above"
    print(f"{name:9} best layer {r['layer']}: {r['mean']:.2f} ({interval}), {above} chance ({r['chance']:.2f})")

# %% [markdown]
# A layer below the output that reads above chance still holds some of the answers, and the edit hides them only on
# the way up. And where none does, an answer can still be there in a form that this lens does not read: that is what
# the attacks of notebook 5 are for.
#
# ## And back
#
# The Erasure is applied and reverted: the weights are the same to the bit.

# %%
original = run.model.fingerprint()
handle = erasure.apply(run.model)
edited = run.model.fingerprint()
handle.revert()
print("edited differs:", edited != original, "· reverted is the original:", run.model.fingerprint() == original)
