# %% [markdown]
# # 4 · Methods side by side
#
# Every method with its defaults (SSPU with the demo's settings), on the same world, the same SAEs and selection where
# it needs them, the same retention budget (2 % rise of the retain loss; overwriting 3 %, guards 1 %), several seeds.
#
# Limits: one world, on which the defaults were chosen. Seeds vary the training, not SAEs, selection or world. For
# tuned methods on worlds that nothing was chosen on see `benchmarks/RESULTS.md`, or `saeunlearn compare`.

# %%
import os
from pathlib import Path

from saeunlearn import Corpus, LanguageModel, demo, figures, figures_methods
from saeunlearn.evaluation.side_by_side import frontier_points, side_by_side
from saeunlearn.explore.runs import erasures_of, kept_by, left_of, scores_of

FAST = os.environ.get("SAEUNLEARN_NOTEBOOKS") == "fast"  # a tiny world, for the tests
RUNS = Path("../runs/analysis-fast" if FAST else "../runs/analysis")
SEEDS = (0,) if FAST else (0, 1, 2)
METHODS = ("sspu", "rmu", "npo", "npo-lora", "ga", "graddiff", "reglu", "crisp", "key-erasure", "overwrite", "unierase",
           "clamp", "conditional", "dsg")  # fmt: skip

# %%
box = demo.world(tiny=FAST, oracle=True)
runs = demo.runs(RUNS, box, ("sspu", "rmu", "conditional") if FAST else METHODS, SEEDS)
print(f"{len(runs)} methods × {len(SEEDS)} seeds")

# %% [markdown]
# ## What is left, what is kept
#
# Multiple choice ("choice": by likelihood) and generation ("said": greedy decoding gives the answer). A refusal moves
# the second and hardly the first. Dots are runs; methods that draw nothing at random give the same run three times.

# %% tags=["picture-methods"]
scores = scores_of(runs)
wanted = [(g, m) for g in ("forget/seen", "near/untouched") for m in ("multiple_choice", "cloze")]
wanted.insert(1, ("forget/held_out", "multiple_choice"))
shown = [r for w in wanted for r in scores if (r["group"], r["metric"]) == w]
levels = {r["measure"]: {"original": r["before"]} | ({"chance": r["chance"]} if r["chance"] else {}) for r in shown}
figures_methods.scores(shown, levels)

# %%
choice, said = (left_of(scores, m) for m in ("multiple_choice", "cloze"))
kept = kept_by(scores, "multiple_choice", "near", "far")
print(f"{'':12} forget, choice   forget, said     kept of the worst group")
for m in sorted(runs, key=lambda m: sum(choice[m])):
    parts = (f"{min(v[m]):.2f} … {max(v[m]):.2f}" for v in (choice, said, kept))
    print(f"{m:12} " + "      ".join(parts))

# %% [markdown]
# Read the rows as pairs: forgetting without keeping is easy (a broken model), keeping without forgetting too (nothing
# done).
#
# ## The frontier
#
# Each Erasure again at full, half and a quarter of its strength. Down is more forgetting, right is more retention;
# the floor is what the oracle, which never saw the topic, answers right. 95 % intervals over runs and questions
# together.

# %%
model, oracle = LanguageModel.open(box.model, device="cpu"), LanguageModel.open(box.oracle, device="cpu")
few = ("sspu", "rmu", "npo", "npo-lora", "crisp", "overwrite", "conditional")
drawn = {m: e for m, e in erasures_of(runs).items() if m in few}
found = side_by_side(model, Corpus.load(box.questions), drawn, oracle=oracle, strengths=(1.0, 0.5, 0.25))

# %%
figures.frontier(frontier_points(found))

# %% [markdown]
# Which pairs are apart, by the paired bootstrap with Holm's correction over all pairs? (Three runs are few: such
# intervals are too short, by about a fifth.)

# %%
for outcome, rows in found["tests"].items():
    apart = [r for r in rows if r["p_holm"] < 0.05]
    print(f"{outcome}: {len(apart)} of {len(rows)} pairs are apart")
    for r in apart:
        print(f"  {r['first']} − {r['second']}: {r['low']:+.2f} … {r['high']:+.2f}")

# %% [markdown]
# What this does not show: what a method costs (seconds and memory: `benchmarks/RESULTS.md`), and whether anything is
# *gone*. Notebook 5 attacks these Erasures.
