# %% [markdown]
# # 5 · Attacks, beside the oracle
#
# A low score may mean that the knowledge is gone, or that it does not come out. So it is attacked: relearning on a
# quarter of the facts and on unrelated text, quantisation, ablating the edit's direction, lens, probes, prompts. The
# score counts on facts that the attack never saw, and every attack is made on the *oracle* too: a model retrained
# without the topic. What the oracle also reaches is no recovery.
#
# World 0, one seed of each method: SSPU under all attacks, the others under the most telling ones. Intervals are over
# questions. The attacker's best setting counts.

# %%
import os
from pathlib import Path

from saeunlearn import attack, demo, figures_attacks, figures_methods
from saeunlearn.terminal import attack_lines

FAST = os.environ.get("SAEUNLEARN_NOTEBOOKS") == "fast"  # a tiny world, for the tests
RUNS = Path("../runs/analysis-fast" if FAST else "../runs/analysis")
METHODS = ("sspu",) if FAST else ("sspu", "rmu", "npo-lora", "key-erasure", "overwrite")
READING, TRAINING = ("lens", "probes", "few-shot", "role-play", "prefill"), ("unrelated-lora", "relearn-lora")
ATTACKS = ("none", "int4", "few-shot") if FAST else ("none", "int4", "ablation", *READING, *TRAINING, "keyword")

# %%
box = demo.world(tiny=FAST, oracle=True)
runs = demo.runs(RUNS, box, METHODS)
documents = {m: attack(roots[0], oracle=box.oracle, names=ATTACKS) for m, roots in runs.items()}
if not FAST:  # all of them
    documents["sspu"] = attack(runs["sspu"][0], oracle=box.oracle)

# %% [markdown]
# ## One method: SSPU

# %%
print(attack_lines(documents["sspu"]))

# %%
figures_attacks.attacks(documents["sspu"])

# %% [markdown]
# Attacks that only read or ask (lens, probes, prompts) and attacks that train are two different questions: the first
# says what an honest-but-curious user gets, the second what anyone with the weights and a quarter of the facts gets.
#
# ## Relearning, step by step
#
# Score on the facts that were *not* trained on. Grey: the oracle under the same training.

# %%
figures_attacks.relearning(documents["sspu"])

# %% [markdown]
# ## All methods

# %% tags=["picture-recovered"]
figures_methods.recovered(documents)

# %% [markdown]
# The same attacks on all of them, in two groups: those that read and ask, and those that train.

# %%
from saeunlearn.explore.runs import worst_of

for m, d in documents.items():
    asked, trained = worst_of(d, *READING), worst_of(d, *TRAINING)
    shown = ("    –" if v is None else f"{v:5.0%}" for v in (asked, trained))
    print(f"{m:12} the worst of reading and asking {next(shown)}   of training {next(shown)}")

# %% [markdown]
# ## The other damage
#
# A forget word in front of a question that is to be kept: does the edit spill over?

# %%
for m, d in documents.items():
    for name, scores in ((d["damage"] or {}).get("models") or {}).items():
        print(f"{m:12} {name:10} " + "   ".join(f"{asked} {s['accuracy']:.2f}" for asked, s in scores.items()))

# %% [markdown]
# Limits: the names of this world are single tokens, which helps key erasure and overwriting (`deep_erasure.md` has
# names in pieces); the budget is `quick`; the best setting is chosen on the scored questions, which flatters the
# attacker.
