"""How good SAEs of each architecture get, against sae_lens's trainer on the same activations.

    python benchmarks/sae_architectures.py

Held-out FVU at equal tokens and L0 on sandbox activations. Where sae_lens needs a sparsity coefficient, its FVU is
interpolated at our L0 between several; where they do not enclose it, that is said. Writes a JSON file.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from train_saes import CPU, LR, fvu, trainer

from sae_training import SAEConfig, train_saes
from sae_training.activations import Shuffle, capturing, positions
from sae_training.processes import Processes
from saeunlearn.checkpoints import write_json
from saeunlearn.corpus import Corpus, windows
from saeunlearn.models import LanguageModel
from saeunlearn.progress import ConsoleProgress, Progress
from saeunlearn.sandbox.build import SandboxConfig, WorldConfig, build

# sae_lens's sparsity coefficients, for an L0 on both sides of ours
COEFFICIENTS = {"jumprelu": (0.03, 0.1, 0.3), "gated": (1.0, 4.0, 16.0), "relu": (4.0, 16.0, 64.0)}


def architectures(args: argparse.Namespace) -> dict[str, Any]:
    """Every run and the ratio of the FVUs; `enclosed` says whether sae_lens's curve reaches our L0 from both sides."""
    import sae_lens

    box = build(SandboxConfig(world=WorldConfig(seed=args.world)), ConsoleProgress())
    model = LanguageModel.open(box.model)
    both = Corpus(Corpus.load(box.forget).records + Corpus.load(box.retain).records)
    rest, held_out = both.split(0.1, 0)
    layer, k, tokens, batch = 2, 16, 300_000, 1024
    items, tests = windows(rest, model), windows(held_out, model)
    held = torch.empty(1, sum(map(positions, tests)), model.d_model)
    capturing(model, tests, [layer])(range(len(tests)), held)
    m = 8 * model.d_model

    def measured(sae: Any, scale: float) -> tuple[float, float]:
        with torch.no_grad():
            z = sae.encode(held[0] * scale)
            return float((z > 0).sum(-1).double().mean()), fvu(held[0] * scale, sae.decode(z))

    def theirs(kind: str, seed: int, **settings: Any) -> tuple[float, float]:
        stream = Shuffle(
            items, capturing(model, items, [layer]), (1, model.d_model), batch, 10**6, seed, CPU, Processes()
        )
        scale = math.sqrt(model.d_model) / float(next(stream.from_step(0))[0].norm(dim=-1).mean())
        torch.manual_seed(seed)
        config = getattr(sae_lens, f"{kind}TrainingSAEConfig")
        sae = getattr(sae_lens, f"{kind}TrainingSAE")(
            config(d_in=model.d_model, d_sae=m, apply_b_dec_to_input=True, **settings)
        )
        steps = math.ceil(tokens / batch)
        data = (h[0] * scale for h in stream.from_step(0))
        sae = trainer(data, sae, steps, LR, batch).fit()
        with tempfile.TemporaryDirectory() as folder:
            sae.save_inference_model(folder)
            return measured(sae_lens.SAE.load_from_disk(folder), scale)

    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "topk": ("TopK", {"k": k}), "batchtopk": ("BatchTopK", {"k": float(k)}),
        "matryoshka": ("MatryoshkaBatchTopK", {"k": float(k), "matryoshka_widths": [m // 8, m // 4, m // 2, m]}),
        "relu": ("Standard", {}), "gated": ("Gated", {}),
        "jumprelu": ("JumpReLU", {
            "jumprelu_sparsity_loss_mode": "tanh", "jumprelu_init_threshold": 0.1, "jumprelu_bandwidth": 2.0,
            "jumprelu_ste_to_input": True, "pre_act_loss_coefficient": 3e-6,
        }),
    }  # fmt: skip
    result: dict[str, Any] = {}
    for name in args.architectures or kinds:
        kind, settings = kinds[name]
        rows = []
        for seed in args.seeds:
            config = SAEConfig(architecture=name, k=k, tokens=tokens, batch=batch)  # type: ignore[arg-type]
            ours = train_saes(model, items, [layer], config, seed=seed, progress=Progress())[layer]
            l0, mine = measured(ours, 1.0)
            row: dict[str, Any] = {"seed": seed, "l0": l0, "fvu": mine}
            if settings.get("k"):
                peer = theirs(kind, seed, **settings)
            else:
                coefficient = "l0_coefficient" if name == "jumprelu" else "l1_coefficient"
                curve = sorted(theirs(kind, seed, **settings, **{coefficient: c}) for c in COEFFICIENTS[name])
                x, y = np.log([(max(point, 0.1), value) for point, value in curve]).T
                peer = l0, float(np.exp(np.interp(math.log(l0), x, y)))
                row |= {"sae_lens curve": curve, "enclosed": curve[0][0] <= l0 <= curve[-1][0]}
            rows.append(row | {"sae_lens l0": peer[0], "sae_lens fvu": peer[1]})
            print(name, rows[-1], flush=True)
        ratios = [r["fvu"] / r["sae_lens fvu"] for r in rows]
        result[name] = {"runs": rows, "fvu against sae_lens": [statistics.mean(ratios), min(ratios), max(ratios)]}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", type=int, default=0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--architectures", nargs="+", help="only these (default: all six)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/sae_architectures.json"))
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    result = architectures(args)
    write_json(args.out, result)
    print(result)


if __name__ == "__main__":
    main()
