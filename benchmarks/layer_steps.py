"""What a method gains that needs only the stream after block l: one training step with truncated and with full passes.

    python benchmarks/layer_steps.py

RMU's step at one third of a random 12-block Llama, the same losses and trained matrices on both sides; the sides take
turns. `cached`: the frozen model's retain activations are at hand; `recomputed`: they are computed in every step.
Prints and writes the ratios of the median times, with the least and the greatest over pairs of turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from saeunlearn.checkpoints import write_json
from saeunlearn.methods.deltas import attached, frozen, new_deltas
from saeunlearn.updates import make_update

BLOCKS, LAYER, VOCABULARY = 12, 3, 4096


class Bare:
    """A network without tokenizer: just what `capture` needs."""

    def __init__(self, d_model: int) -> None:
        torch.manual_seed(0)
        shape = {"hidden_size": d_model, "intermediate_size": 4 * d_model, "num_attention_heads": 8}
        config = LlamaConfig(num_hidden_layers=BLOCKS, vocab_size=VOCABULARY, **shape)
        self.model = LlamaForCausalLM(config).eval()


def step(model: Any, capture: Callable[[Tensor], Tensor], cached: bool, ids: tuple[Tensor, Tensor], state: Any) -> None:
    update, deltas, kept_before, target = state
    f, r = ids

    def trained(x: Tensor) -> Tensor:
        with attached(deltas):
            return capture(x)

    def kept() -> Tensor:
        if cached:
            before = kept_before
        else:
            with torch.no_grad():
                before = capture(r)
        return 100 * (trained(r) - before).pow(2).mean()

    with frozen(model):
        update(lambda: (trained(f) - target).pow(2).mean(), kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/layer_steps.json"))
    args = parser.parse_args()
    from saeunlearn.models import LanguageModel

    model: Any = LanguageModel.__new__(LanguageModel)
    model.model = model._base = Bare(args.d_model).model
    model.blocks, model.n_layers, model.name = model.model.model.layers, BLOCKS, "random"
    ids = tuple(torch.randint(VOCABULARY, (args.rows, args.length)) for _ in range(2))

    def full(x: Tensor) -> Tensor:
        held: list[Tensor] = []
        handle = model.blocks[LAYER].register_forward_hook(
            lambda _m, _a, out: held.append(out[0] if isinstance(out, tuple) else out)
        )
        model.model(input_ids=x, use_cache=False)
        handle.remove()
        return held[0]

    def truncated(x: Tensor) -> Tensor:
        return model.capture(x, [LAYER])[LAYER]

    with torch.no_grad():
        before = truncated(ids[1])
        assert torch.equal(before, full(ids[1]))
    result = {}
    for name, cached in (("cached", True), ("recomputed", False)):
        sides = {}
        for side, capture in (("truncated", truncated), ("full", full)):
            deltas = new_deltas(model.writers([LAYER - 2, LAYER - 1, LAYER]), [None] * 3)
            update = make_update("plain", [{"params": [d.free for d in deltas], "lr": 1e-3}])
            state = (update, deltas, before, torch.ones(args.d_model))
            sides[side] = (partial(step, model, capture, cached, ids, state), [])
        for turn in range(args.turns + 1):
            for run, times in sides.values():
                started = time.perf_counter()
                run()
                if turn:  # the first warms up
                    times.append(time.perf_counter() - started)
        pairs = [a / b for a, b in zip(sides["truncated"][1], sides["full"][1])]
        ratio = statistics.median(sides["truncated"][1]) / statistics.median(sides["full"][1])
        result[name] = {"ratio": ratio, "least": min(pairs), "greatest": max(pairs)}
        print(f"{name}: a truncated step takes {ratio:.2f} of a full one ({min(pairs):.2f} to {max(pairs):.2f})")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, {"layer": LAYER, "blocks": BLOCKS, "d_model": args.d_model, **result})


if __name__ == "__main__":
    main()
