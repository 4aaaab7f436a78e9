# %% [markdown]
# # 1 · Find and read the features of a topic
#
# Which SAE features carry a topic, where, and what do they say? We take the built-in world: a small language model
# that learned facts about four invented topics. One of them, `agents`, is to be forgotten; `remedies` is its near
# neighbour.
#
# The first cell opens the run of `saeunlearn demo` and makes it if it is not there (minutes). One world, one seed,
# one set of SAEs: what is seen here is an example, not a finding.

# %%
import os
from pathlib import Path

from saeunlearn import demo, figures, figures_features, open_run
from saeunlearn.explore.feature import feature_view, find_features, layer_view
from saeunlearn.explore.index import run_index

FAST = os.environ.get("SAEUNLEARN_NOTEBOOKS") == "fast"  # a tiny world, for the tests
RUNS = Path("../runs/analysis-fast" if FAST else "../runs/analysis")

# %%
box = demo.world(tiny=FAST)
run = open_run(demo.runs(RUNS, box)["sspu"][0])
for name, text in run.texts.items():
    print(f"{name:8} {len(text):5} records   {text.records[0].text}")

# %% [markdown]
# ## Which layer?
#
# Every layer has an SAE. The selection scores all of them from one pass over the texts, and lets short probe runs
# decide: a layer is good if little unlearning there raises the loss on the forget text a lot, at the same cost on
# retain text.

# %% tags=["picture-layers"]
figures.layer_table(run.selection.layers)

# %% [markdown]
# The scores that need no training (AUC, share, specificity …) disagree with one another; the probe is what the choice
# rests on. Notebook 2 runs every layer to its end and looks whether the choice was right.
#
# ## Which features?
#
# A feature is *relevant* if it is among the most active on forget text and much more active there than on retain
# text.

# %%
selection = run.selection
figures.feature_scores(selection.forget_scores, selection.retain_scores, selection.relevant, selection.irrelevant)

# %% [markdown]
# To read them we need the words. An index of every feature's activity is made once, from one pass over the texts.

# %%
from saeunlearn.terminal import feature_lines

index = run_index(run)
view = layer_view(run, index, selection.layer)
print(feature_lines(view, selection.relevant[:12]))

# %% [markdown]
# Scores are mean squared activations relative to the squared norm of the stream. And the same list for the irrelevant
# ones, which SSPU may use as a place to push to:

# %%
print(feature_lines(view, selection.irrelevant[:6]))

# %% [markdown]
# ## Reading a feature
#
# The strongest contexts of the three most relevant features, on forget, near and far text. The far text shows how
# clean a feature is: whatever is shaded there is not about the topic.

# %%
views = [feature_view(run, index, selection.layer, j) for j in selection.relevant[:3]]
figures_features.contexts(views)

# %% [markdown]
# How often is the first of them active, how strongly, and which tokens does its decoder row make more or less
# probable?

# %%
figures_features.feature(views[0])

# %% [markdown]
# And the other way round: from a word to features, here from the word that the second feature is most active on. The
# search finds features that are active on the word, and features whose decoder row promotes it.

# %%
strongest = views[1]["examples"]["forget"][0]
word = strongest["tokens"][strongest["at"]].strip()
for found in find_features(run, index, word, selection.layer)[:8]:
    print(f"{found['by']:10} {word!r}: feature {found['feature']}, {found['value']:.3g}")

# %% [markdown]
# ## Does the model need them?
#
# Knowing the features is not yet forgetting. Below, all relevant features are set to zero at every position, in the
# forward pass alone, and the questions are asked again.

# %%
from saeunlearn import evaluate
from saeunlearn.evaluation.evaluate import combine
from saeunlearn.explore.steer import steering

before = evaluate(run.model, questions=run.questions, metrics=["multiple_choice"])
with steering(run, selection.layer, {j: {"scale": 0.0} for j in selection.relevant}) as model:
    after = evaluate(model, questions=run.questions, metrics=["multiple_choice"])

# %%
figures.before_after(combine(before, after)["comparison"])

# %%
rows = [r for r in combine(before, after)["comparison"] if r["group"].startswith("forget")]
for r in rows:
    lost = (r["before"] - r["after"]) / (r["before"] - r["chance"])
    print(f"{r['group']}: {r['before']:.2f} → {r['after']:.2f}; {lost:.0%} of what was known above chance is gone")

# %% [markdown]
# The lines above say how much of the topic hangs on these features alone, at this one layer. Whatever is left is
# carried by other features, by what the SAE does not explain, or by other layers. Notebook 3 takes an Erasure apart
# that goes further.
