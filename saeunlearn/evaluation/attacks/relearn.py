"""Relearning: fine-tune on some forget facts, or on unrelated text, and test on OTHER forget facts.

LoRA and full fine-tuning at several learning rates; the best of them and of the steps on the way counts. Hooks of the
Erasure (guards, offsets) stay attached while the weights under them are trained.
"""

from __future__ import annotations

from typing import Literal

import torch

from ...corpus import endless, windows
from ...errors import NonFiniteError
from ...models import LanguageModel
from ...training import TrainConfig, train
from .case import Case, Try, Victim

RANK = 128  # of the LoRA (paper), where the model is that wide


def relearn(
    case: Case, victim: Victim, *, text: Literal["forget", "unrelated"], weights: Literal["lora", "full"]
) -> list[Try]:
    """A try for each number of samples and learning rate, scored at its best step (0 where training only hurt)."""
    corpus, budget = (case.train if text == "forget" else case.unrelated), case.budget
    sizes = sorted({min(n, len(corpus)) for n in budget.samples})
    rates = budget.lora_rates if weights == "lora" else budget.full_rates
    return [_fine_tune(case, victim, text, weights, n, lr) for n in sizes for lr in rates]


def _fine_tune(case: Case, victim: Victim, text: str, weights: str, samples: int, lr: float) -> Try:
    corpus = (case.train if text == "forget" else case.unrelated).sample(samples, case.seed)
    scores: dict[int, list[float]] = {0: case.score(victim.model).values}
    model = victim.fresh()
    model.model.float()

    def after(step: int) -> None:
        if step in case.budget.marks:
            scores[step] = case.score(model).values

    diverged = False
    with torch.random.fork_rng():  # LoRA's start, and dropout where the model has any
        torch.manual_seed(case.seed)
        settings: dict[str, object] = {"samples": samples, "lr": lr}
        if weights == "lora":
            settings["rank"] = add_lora(model)
        else:
            model.model.requires_grad_(True)
        rows = endless(windows(corpus, model), model.pad_id, case.budget.batch, case.seed)
        plan = TrainConfig(steps=case.budget.steps, lr=lr, weight_decay=0.0)
        try:
            train(model, rows, plan, case.progress, f"relearning: {text} text, {weights}, {lr:g}", after)
        except NonFiniteError:
            diverged = True  # a learning rate too high is a failed try, no failure of the battery
    means = {step: case.mean(v) for step, v in scores.items()}
    best = max(means, key=lambda s: (case.sign * means[s], -s))
    return Try(
        {**settings, "steps": best}, scores[best], [{"step": s, case.metric: m} for s, m in means.items()],
        extra={"diverged": True} if diverged else {},
    )  # fmt: skip


def add_lora(model: LanguageModel) -> int:
    """Put a trainable LoRA on every linear layer of the blocks, in place; returns its rank. The rest is frozen.

    The model object stays the same, so that hooks on it are still called (PEFT's wrapper goes around them).
    """
    from peft import LoraConfig, inject_adapter_in_model

    rank = min(RANK, model.d_model)
    names = {name for block in model.blocks for name in linear_names(block)}
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=sorted(names), lora_dropout=0.0,
                        fan_in_fan_out=model.writers([0])[0].transposed)  # fmt: skip
    inject_adapter_in_model(config, model.model)
    return rank


def linear_names(block: torch.nn.Module) -> list[str]:
    """Names within a block of its matrices: linear layers, and GPT-2's Conv1D."""
    return [n for n, m in block.named_modules() if isinstance(m, torch.nn.Linear) or type(m).__name__ == "Conv1D"]
