# %% [markdown]
# # 6 · Your own model, your own files
#
# Ten cells from a folder and two JSONL files to an edited checkpoint. Put your own paths into the second cell:
# `MODEL` is a Hugging Face folder (Llama, GPT-2, GPT-NeoX, Gemma-2 layouts), a file holds a record a line (`{"text":
# …}`, `{"question": …, "answer": …}` …).
#
# The outputs below are of stories260K, a small real model of children's stories (d = 64, five blocks), and the topic
# *birds*; where it is not at hand the built-in world takes its place. One seed. Three, and all methods: RESULTS.md.

# %%
import os
from pathlib import Path

from saeunlearn import RunConfig, demo, figures, figures_erasure, figures_features, open_run, unlearn

FAST = os.environ.get("SAEUNLEARN_NOTEBOOKS") == "fast"  # a tiny world, for the tests
RUNS = Path("../runs/analysis-fast" if FAST else "../runs/analysis")
DATA = Path("../../shared/data")

# %%
if (DATA / "stories260K").is_dir() and not FAST:
    stories = DATA / "tinystories"
    config = RunConfig(
        model=DATA / "stories260K", forget=stories / "forget_birds_train.jsonl", retain=stories / "retain_train.jsonl",
        eval_texts={"forget/unseen": stories / "forget_birds_test.jsonl", "retain/unseen":
                    stories / "retain_test.jsonl"}, include_text=True,
        sae={"tokens": 300_000}, settings={"max_length": 128},  # less than the defaults, to save minutes
    )  # fmt: skip
else:
    config = demo.config(demo.world(tiny=FAST), include_text=True)

# %% [markdown]
# One call trains the SAEs, chooses layer and features, unlearns within the retention budget, measures, and writes a
# report. Killed at any moment, the same call goes on.

# %%
run = open_run(unlearn(config, RUNS / "own").root)
print(f"{run.model.name}: {run.model.n_layers} blocks, d = {run.model.d_model}; layer {run.selection.layer}, "
      f"K = {run.selection.k}; {', '.join(f'{len(t)} {n}' for n, t in run.texts.items())}")  # fmt: skip

# %%
figures.layer_table(run.selection.layers)

# %% [markdown]
# Where are the chosen features active? In a model as small as this one no single feature need be about the topic: its
# words are written in pieces, and a feature answers to a piece. The gate weighs several of them together, and the
# cells below show what it comes to. If *all* that you see there has nothing to do with your topic, another forget set
# is needed, or a retain set that contains what should stay.

# %%
from saeunlearn.explore.feature import feature_view
from saeunlearn.explore.index import run_index

index = run_index(run)
views = [feature_view(run, index, run.selection.layer, j) for j in run.selection.relevant[:4]]
figures_features.contexts(views, texts=list(index.texts)[:2])

# %% [markdown]
# What it cost, and what it brought. The loss over whole forget texts moves little where most of their words are not
# about the topic: the two cells after this look at single words.

# %%
figures.before_after(run.documents["evaluation"]["comparison"])

# %%
from saeunlearn.explore.compare import compare_view

name = config.method
text = (
    "Tom looked up and saw a bird. The bird sat in its nest and"
    if run.questions is None
    else run.forget.records[0].text
)
seen = compare_view(run, text, [name])
figures_erasure.token_losses(seen["models"])

# %%
for n, m in seen["models"].items():
    print(f"{n:9} {text} … {m['generated']!r}")

# %% [markdown]
# Into a checkpoint, and back. The merged folder is an ordinary Hugging Face folder.

# %%
from tempfile import TemporaryDirectory

from saeunlearn.erasure import fingerprint_folder, unmerge

with TemporaryDirectory() as folder:
    run.erasures[name].merge(config.model, f"{folder}/edited")
    unmerge(f"{folder}/edited", f"{folder}/back")
    prints = {f: fingerprint_folder(path)[:12] for f, path in
              (("original", config.model), ("edited", f"{folder}/edited"), ("back", f"{folder}/back"))}  # fmt: skip
print(prints)

# %% [markdown]
# Before giving it away: attack it (notebook 5, or `saeunlearn attack ../runs/analysis/own`), and read in the report
# what is *not* claimed. A trained edit that drives answers away hides at least as much as it removes.
