# %% [markdown]
# # 2 · The subspaces
#
# SSPU confines the weight update to the span of the relevant features' decoder rows. What does that subspace look
# like, does the text of the topic live in it, does the layer matter, and would random directions do as well?
#
# Every question has its control: K random decoder rows, and K random directions. World 0, on which the settings were
# chosen; the SAEs and the selection are one draw, the runs at the end are repeated with several seeds.

# %%
import os
from pathlib import Path

from saeunlearn import demo, figures_features, figures_methods, open_run
from saeunlearn.explore.runs import kept_by, left_of, scores_of
from saeunlearn.features.geometry import geometry, variance_shares

FAST = os.environ.get("SAEUNLEARN_NOTEBOOKS") == "fast"  # a tiny world, for the tests
RUNS = Path("../runs/analysis-fast" if FAST else "../runs/analysis")
SEEDS = (0,) if FAST else (0, 1, 2)

# %%
box = demo.world(tiny=FAST)
roots = demo.runs(RUNS, box, seeds=SEEDS)
run = open_run(roots["sspu"][0])
selection = run.selection
print(f"layer {selection.layer} of {run.model.n_layers}, K = {selection.k} of d = {selection.d_model}")

# %% [markdown]
# ## Spectrum and angles
#
# If the relevant rows were orthogonal, all singular values would be 1; a steep spectrum says that they share
# directions. Principal angles near 90° say that the subspace has little to do with the other one.

# %%
found = geometry(run.saes[selection.layer].W_dec, selection.relevant, selection.irrelevant)
figures_features.geometry(found)

# %%
for name, drawn in found["angles"].items():
    smallest = [angles[0] for angles in drawn]
    print(f"smallest angle to {name}: {min(smallest):.0f}° … {max(smallest):.0f}°")
print(f"steepness of the relevant rows: {found['spectra']['relevant'][0][0]:.2f}, of random features: "
      f"{min(s[0] for s in found['spectra']['random features']):.2f} … "
      f"{max(s[0] for s in found['spectra']['random features']):.2f}")  # fmt: skip

# %% [markdown]
# K is a good part of d here: two subspaces of K dimensions each cannot avoid one another, whoever chose them. That is
# why the random draws are in the figure.
#
# ## Does the topic live in it?
#
# Share of each text's variance (around the mean of all texts) inside the span, at every layer, each layer with
# relevant features of its own. The runs with a fixed layer are made here, for this and for what follows.

# %%
others = [i for i in range(run.model.n_layers) if i != selection.layer]
made = demo.carry_out({
    RUNS / f"sspu-layer-{i}": demo.config(box, saes=roots["sspu"][0] / "saes", select={"layer": i}) for i in others
})  # fmt: skip
at = {selection.layer: roots["sspu"][0], **dict(zip(others, made))}

# %%
from saeunlearn.features.selection import Selection

relevant = {i: Selection.load(root / "selection.json").relevant for i, root in at.items()}
texts = {name: text.sample(400, 0) for name, text in run.texts.items()}
shares = variance_shares(run.model, run.saes, relevant, texts)
figures_features.variance_shares(shares)

# %%
for row in shares:
    above = row["features"] > max(row["random features"])
    print(f"layer {row['layer']}, {row['text']:7}: {row['features']:.2f} in the relevant span, "
          f"{'above' if above else 'not above'} all random features")  # fmt: skip

# %% [markdown]
# A span that holds much of the forget text's variance *and* of the near text's is not specific: near text is written
# with the same phrases. And a draw of random features can hold more than the relevant ones, if features that are
# active in every text are among it: those carry most of the variance. Relevance is about the difference between
# texts, not about size.
#
# ## Why the layer matters
#
# The same method and settings at every layer, to the end. One seed; intervals are over questions.

# %%
rows = []
for layer, root in sorted(at.items()):
    for r in open_run(root).documents["evaluation"]["comparison"]:
        if r["metric"] == "multiple_choice" and not r["group"].endswith("held_out"):
            rows.append({"layer": layer, "series": r["group"], "value": r["after"], "low": r["after_low"],
                         "high": r["after_high"], "chance": r["chance"]})  # fmt: skip
figures_features.scores_along(rows, "layer", "Multiple choice after unlearning at one layer")

# %%
layers = scores_of({str(i): [root] for i, root in sorted(at.items())})
left, kept = left_of(layers, "multiple_choice"), kept_by(layers, "multiple_choice", "near", "far")
for i in left:
    mark = "  ← chosen by the probe runs" if int(i) == selection.layer else ""
    print(f"layer {i}: {left[i][0]:.2f} left of the topic, {kept[i][0]:.2f} kept of the worst other group{mark}")

# %% [markdown]
# ## Do the features matter?
#
# The same layer, K, settings and seeds, once with the relevant rows, once with K random decoder rows, once with a
# random basis. If the SAE's directions do the work, the first should forget more at the same cost.

# %%
shared = {"saes": roots["sspu"][0] / "saes", "selection": roots["sspu"][0] / "selection.json"}
made = demo.carry_out({
    RUNS / f"{basis}-{s}": demo.config(box, seed=s, settings={"basis": basis}, **shared)
    for basis in ("random_rows", "random_basis") for s in SEEDS
})  # fmt: skip
n = len(SEEDS)
variants = {"relevant features": roots["sspu"], "random rows": made[:n], "random basis": made[n:]}

# %%
scores = [r for r in scores_of(variants) if r["metric"] == "multiple_choice"]
levels = {r["measure"]: {"original": r["before"], "chance": r["chance"]} for r in scores}
figures_methods.scores(scores, levels)

# %%
left, kept = left_of(scores, "multiple_choice"), kept_by(scores, "multiple_choice", "near", "far")
for name in variants:
    print(f"{name:18} forget {min(left[name]):.3f} … {max(left[name]):.3f}, "
          f"kept of the worst group {min(kept[name]):.3f} … {max(kept[name]):.3f}")  # fmt: skip
overlap = max(left["relevant features"]) >= min(left["random basis"])
print("forgetting by relevant features and by a random basis " + ("overlaps" if overlap else "is apart"))

# %% [markdown]
# In these worlds every sentence of the forget set is the topic, so *where* to push is given and any K directions of
# the stream serve. Where forget text is mixed (notebook 6), the features' gate decides which positions are pushed,
# and there they earn their place. The hard form keeps the update inside K directions in each of the three variants:
# that, not the choice of directions, is what the three have in common.
