# %% [markdown]
# # 7 · What the papers claim, and what we measure
#
# Claim by claim: a published statement, what stands for it here, and a verdict that is *computed*: **confirmed**
# where it holds in every run, **not confirmed** where it holds in none, **unsure** in between, **not testable here**
# where nothing at this scale can say anything.
#
# Read the verdicts for what they are. The model has four blocks and 1.2 million parameters, the world is invented,
# the retention budget is ours, the settings are our defaults, seeds vary the training alone. A claim about a
# 7-billion model is neither proved nor refuted here; a verdict says whether it *carries over* to this world.

# %%
import os
from pathlib import Path

from saeunlearn import attack, demo, unlearn
from saeunlearn.evaluation.published import Claim, judge, less, markdown
from saeunlearn.explore.runs import kept_by, left_of, recovered_by, scores_of

FAST = os.environ.get("SAEUNLEARN_NOTEBOOKS") == "fast"  # a tiny world, for the tests
RUNS = Path("../runs/analysis-fast" if FAST else "../runs/analysis")
SEEDS = (0,) if FAST else (0, 1, 2)
METHODS = ("sspu", "rmu", "npo", "npo-lora", "graddiff", "reglu", "crisp", "unierase", "clamp", "conditional", "dsg")

# %% [markdown]
# The runs of notebooks 4 and 5 (made here if they are not there), and what each left of the topic and kept of the
# rest. `choice`: share of forget questions answered by likelihood; `said`: by generation; `kept`: after / before of
# the worst near or far group.

# %%
box = demo.world(tiny=FAST, oracle=True)
runs = demo.runs(RUNS, box, METHODS, SEEDS)
scores = scores_of(runs)
choice, said = (left_of(scores, m) for m in ("multiple_choice", "cloze"))
kept = kept_by(scores, "multiple_choice", "near", "far")
(chance,) = {round(r["chance"], 6) for r in scores if r["metric"] == "multiple_choice" and r["group"] == "forget/seen"}
known = next(r["before"] for r in scores if r["metric"] == "multiple_choice" and r["group"] == "forget/seen")


# %%
gone = {m: [(known - v) / (known - chance) for v in left] for m, left in choice.items()}  # share of what was known
claims: list[Claim] = []

# %% [markdown]
# ## SSPU (Wang et al., EMNLP 2025)

# %%
ATTACKS = ("none", "int4", "few-shot", "role-play", "prefill")
if not FAST:
    ATTACKS += ("ablation", "unrelated-lora", "relearn-lora")
documents = {m: attack(runs[m][0], oracle=box.oracle, names=ATTACKS) for m in ("sspu", "rmu")}
after = {m: {a["name"]: a["best"] for a in d["attacks"] if "best" in a} for m, d in documents.items()}
asked = [n for n in ("few-shot", "role-play", "prefill") if all(n in a for a in after.values())]

# %%
usable = [m for m in choice if m not in ("sspu", "clamp", "conditional", "dsg") and min(kept[m]) >= 0.9]
strongest = [min(choice[m][i] for m in usable) for i in range(len(SEEDS))] if usable else choice["rmu"]
claims += [
    Claim("SSPU", "WMDP-Cyber accuracy 3.22 points below the strongest baseline",
          "forget choice of the best baseline that keeps ≥ .9, less SSPU's",
          less(choice["sspu"], strongest), at_least=0.0322),
    Claim("SSPU", "general ability is kept",
          "worst near or far group kept", kept["sspu"], at_least=0.95),
    Claim("SSPU", "lower accuracy than RMU under jailbreak prompts",
          f"RMU's accuracy less SSPU's after {', '.join(asked)} (seed 0; a run is a prompt attack)",
          [after["rmu"][n]["accuracy"] - after["sspu"][n]["accuracy"] for n in asked], at_least=0.0),
]  # fmt: skip

# %% [markdown]
# The claim behind the method is that the SAE's directions matter. The control decides: the same run with a random
# basis.

# %%
shared = {"saes": runs["sspu"][0] / "saes", "selection": runs["sspu"][0] / "selection.json"}
wanted = {RUNS / f"random_basis-{s}": demo.config(box, seed=s, settings={"basis": "random_basis"}, **shared)
          for s in SEEDS}  # fmt: skip
random = {"random": demo.carry_out(wanted)}
control = left_of(scores_of(random), "multiple_choice")["random"]
claims += [
    Claim("SSPU", "the features' subspace is what makes it work",
          "forget choice with a random basis, less that with the relevant rows",
          less(choice["sspu"], control), at_least=0.05),
]  # fmt: skip

# %% [markdown]
# ## RMU (Li et al., 2403.03218), and what later papers found about it

# %%
claims += [
    Claim("RMU", "Gemma-2-2B: WMDP-Cyber 33.9 → 28.7 with chance 25, so 58 % of what was above chance is gone",
          "the same share of forget choice", gone["rmu"], at_least=(33.9 - 28.7) / (33.9 - 25)),
    Claim("RMU", "MMLU 46.3 → 44.8: 97 % kept",
          "worst near or far group kept", kept["rmu"], at_least=44.8 / 46.3),
]  # fmt: skip


# %%
claims += [
    Claim("RMU", "one residual direction carries 66–74 % of its effect (Gemma-2-2B)",
          "recovered by ablating the direction (seed 0)", recovered_by(documents["rmu"], "ablation"), at_least=0.66),
    Claim("RMU", "training on ten unrelated samples brings most of it back",
          "recovered by LoRA steps on retain text (seed 0; more samples than ten)",
          recovered_by(documents["rmu"], "unrelated-lora"), at_least=0.5),
    Claim("RMU", "relearned on related text the answers are back (PISCES, table: 93 %)",
          "recovered by LoRA steps on a quarter of the facts, on the others (seed 0)",
          recovered_by(documents["rmu"], "relearn-lora"), at_least=0.93),
]  # fmt: skip

# %% [markdown]
# ## NPO (2404.05868) and low-rank NPO (SemEval-2025 task 4)

# %%
ga = left_of(scores_of(demo.runs(RUNS, box, ["ga"], SEEDS)), "multiple_choice")["ga"]
claims += [
    Claim("NPO", "forgets where gradient ascent collapses",
          "forget choice of GA, less that of NPO, within the same retention budget",
          less(choice["npo"], ga), at_least=0.5),
    Claim("NPO", "and keeps utility",
          "worst near or far group kept", kept["npo"], at_least=0.95),
    Claim("low-rank NPO", "a LoRA of rank 5 forgets like whole-model training",
          "forget choice of full NPO, less that of low-rank NPO",
          less(choice["npo-lora"], choice["npo"]), at_least=-0.05),
    Claim("low-rank NPO", "and keeps at least as much",
          "worst group kept, less full NPO's", less(kept["npo"], kept["npo-lora"]), at_least=-0.01),
    Claim("low-rank NPO", "SemEval final score .539 (1B, rank 2)",
          "needs the task's data, model and its MIA and MMLU parts"),
]  # fmt: skip

# %% [markdown]
# ## UniErase (2505.15674)

# %%
claims += [
    Claim("UniErase", "forget questions are refused",
          "forget answers still said", said["unierase"], at_most=0.05),
    Claim("UniErase", "the rest is untouched",
          "worst near or far group kept", kept["unierase"], at_least=0.98),
    Claim("UniErase", "what is refused is erased",
          "forget choice by likelihood", choice["unierase"], at_most=chance + 0.05),
    Claim("UniErase", "4.01 × the model ability of the best forgetter (TOFU, Llama-3.1-8B)",
          "a ratio of averages over benchmarks that do not exist at this size"),
]  # fmt: skip

# %% [markdown]
# ## δ-unlearning (2404.11045)
#
# The small model is the model itself here (nothing smaller has its tokens), one run.

# %%
settings = {"offset_model": str(box.model)}
delta = {"delta": [unlearn(demo.config(box, "delta", settings=settings), RUNS / "delta-0").root]}
found = scores_of(delta)
claims += [
    Claim("δ-unlearning", "forgets like the same loss applied to the model itself (NPO)",
          "forget choice of NPO, less that of the offset (seed 0)",
          less(left_of(found, "multiple_choice")["delta"], choice["npo"][:1]), at_least=-0.05),
    Claim("δ-unlearning", "and keeps general ability",
          "worst near or far group kept (seed 0)",
          kept_by(found, "multiple_choice", "near", "far")["delta"], at_least=0.95),
]  # fmt: skip

# %% [markdown]
# ## Restricted gradient and diversified retain set (Ko et al., NeurIPS 2024)
#
# GradDiff with the plain sum of gradients against the restricted gradient. And KL with a retain set of far text
# alone, once with, once without copies of the forget records in which other names stand (images there, sentences
# here).

# %%
wanted = {RUNS / f"restricted-{s}": demo.config(box, "graddiff", s, settings={"update": "restricted"}) for s in SEEDS}
found = scores_of({"restricted": demo.carry_out(wanted)})
claims += [
    Claim("restricted gradient", "forgets at least as much as the plain sum",
          "forget choice, restricted less plain",
          less(choice["graddiff"], left_of(found, "multiple_choice")["restricted"]), at_most=0.02),
    Claim("restricted gradient", "and keeps more",
          "worst group kept, restricted less plain",
          less(kept["graddiff"], kept_by(found, "multiple_choice", "near", "far")["restricted"]), at_least=0.0),
]  # fmt: skip

# %%
from saeunlearn import Corpus
from saeunlearn.corpus import write_jsonl
from saeunlearn.diversify import diversify

forget, retain = Corpus.load(box.forget), Corpus.load(box.retain)
names, near = (sorted({r.meta["entity"] for r in c}) for c in (forget, retain.where(set="near")))
far, known_ids = retain.where(set="far"), {r.id for r in retain}
copies = diversify(forget, names, near, seed=0)
sets = {"far": list(far), "diversified": [*far, *(r for r in copies if r.id not in known_ids)]}
for name, kept_records in sets.items():
    write_jsonl(RUNS / f"retain-{name}.jsonl", kept_records)

# %%
made = demo.carry_out({
    RUNS / f"kl-{n}-{s}": demo.config(box, "kl", s, retain=RUNS / f"retain-{n}.jsonl") for n in sets for s in SEEDS[:2]
})  # fmt: skip
half = len(made) // 2
found = scores_of({"far": made[:half], "diversified": made[half:]})
near_kept, left = kept_by(found, "multiple_choice", "near"), left_of(found, "multiple_choice")
claims += [
    Claim("diversified retain set", "keeps what a distant retain set lets slip",
          "near kept, with less without the diversified records",
          less(near_kept["far"], near_kept["diversified"]), at_least=0.02),
    Claim("diversified retain set", "and forgets as much",
          "forget choice, with less without", less(left["far"], left["diversified"]), at_most=0.05),
    Claim("restricted gradient", "image–text alignment .350/.352 (nudity, Van Gogh)",
          "images: no diffusion model here"),
]  # fmt: skip

# %% [markdown]
# ## SAE methods: clamping, conditional clamping, DSG, CRISP, PISCES

# %%
from saeunlearn import open_run
from saeunlearn.evaluation.metrics import multiple_choice
from saeunlearn.explore.steer import steering

run = open_run(runs["sspu"][0])
asked = run.questions.where(set="forget")
with steering(run, run.selection.layer, {j: {"scale": 0.0} for j in run.selection.relevant}) as model:
    ablated = multiple_choice(model, asked).mean
claims += [
    Claim("clamping", "zero-ablation of the features does not unlearn (2410.19278)",
          "share gone with all relevant features at zero", [(known - ablated) / (known - chance)], at_most=0.25),
    Claim("clamping", "negative clamping does",
          "share gone", gone["clamp"], at_least=0.5),
    Claim("conditional clamping", "at least as much forgotten as by clamping everywhere (2503.11127)",
          "share gone, conditional less clamp", less(gone["clamp"], gone["conditional"]), at_least=0.0),
    Claim("conditional clamping", "and less damage",
          "worst group kept, conditional less clamp", less(kept["clamp"], kept["conditional"]), at_least=0.0),
]  # fmt: skip

# %%
claims += [
    Claim("DSG", "forgets more than static clamping (2504.08192)",
          "share gone, DSG less clamp", less(gone["clamp"], gone["dsg"]), at_least=0.0),
    Claim("DSG", "at no less utility",
          "worst group kept, DSG less clamp", less(kept["clamp"], kept["dsg"]), at_least=0.0),
    Claim("CRISP", "WMDP-Cyber 33.9 → 27.3 with chance 25, so 74 % of what was above chance is gone (2508.13650)",
          "the same share", gone["crisp"], at_least=(33.9 - 27.3) / (33.9 - 25)),
    Claim("CRISP", "MMLU 46.3 → 46.3",
          "worst near or far group kept", kept["crisp"], at_least=0.99),
    Claim("CRISP", "forgets more than RMU",
          "share gone, CRISP less RMU", less(gone["rmu"], gone["crisp"]), at_least=0.0),
    Claim("PISCES", "relearned accuracy 65, RMU's 93 (2505.22586)",
          "not among the methods here"),
]  # fmt: skip

# %% [markdown]
# ## ReGLU (2604.17396), and quantisation

# %%
quantised = [v["int4"]["recovered"] for v in after.values() if v.get("int4", {}).get("recovered") is not None]
claims += [
    Claim("ReGLU", "keeps at least as much as plain low-rank training",
          "worst group kept, ReGLU less low-rank NPO", less(kept["npo-lora"], kept["reglu"]), at_least=-0.01),
    Claim("ReGLU", "and forgets as much",
          "share gone, ReGLU less low-rank NPO", less(gone["npo-lora"], gone["reglu"]), at_least=-0.05),
    Claim("quantisation", "rounding to 4 bit brings 83 % of the forgotten knowledge back",
          "recovered by int4 (a run is a method, seed 0)", quantised or None, at_least=0.83),
]  # fmt: skip

# %% [markdown]
# ## The table

# %% tags=["claims"]
from IPython.display import Markdown

rows = judge(claims)
Markdown(markdown(rows))

# %%
from collections import Counter

for word, n in Counter(r["verdict"] for r in rows).most_common():
    print(f"{n:3} {word}")

# %% [markdown]
# Methods that draw nothing at random (clamping, DSG …) have three equal runs. What may explain a verdict that differs
# from its paper: the size of the model, names that are single tokens, a retention budget that some papers do not
# have, thresholds of ours where a paper gives a direction only (the column *holds where* says which), one to three
# runs, and our defaults, which nobody tuned for the paper's side. Where three runs scatter as widely as here,
# "unsure" is what they can say.
