"""Peak memory of low-rank NPO against plain LoRA fine-tuning of the same model, rank, batch and length.

    python benchmarks/lora_memory.py

Each side runs in a process of its own, on a random Llama. Plain fine-tuning takes the loss that transformers gives for
labels. Prints and writes the peaks (MB) and the ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from saeunlearn.checkpoints import write_json
from saeunlearn.corpus import Window, collate
from saeunlearn.methods.gradient import Task
from saeunlearn.methods.npo import LowRankNPO, LowRankNPOConfig
from saeunlearn.methods.trainable import trainable
from saeunlearn.models import LanguageModel
from saeunlearn.updates import make_update

VOCABULARY, LENGTH, BATCH, STEPS = 8192, 256, 8, 4


class Words:
    """The least that a LanguageModel asks of a tokenizer."""

    pad_token_id, eos_token_id, bos_token_id = 0, 2, 1

    def __len__(self) -> int:
        return VOCABULARY

    def __call__(self, _text: str) -> Any:
        return type("Read", (), {"input_ids": [1, 3]})


def side(name: str) -> float:
    torch.manual_seed(0)
    shape = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_hidden_layers": 8}
    lm = LanguageModel(LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **shape)), Words())
    draw = torch.randint(3, VOCABULARY, (2, BATCH, LENGTH)).tolist()
    f, r = (collate([Window(tuple(row), 1, i) for i, row in enumerate(rows)], 0) for rows in draw)
    config = LowRankNPOConfig()
    with trainable(lm, "lora", config.rank, 0) as trained:
        update = make_update("plain", trained.groups(config.lr))
        losses = LowRankNPO().objective(Task(lm, None, None, config, 0, None, {}))  # type: ignore[arg-type]
        for _ in range(STEPS):
            if name == "npo-lora":
                update(*losses(trained, f, r))
            else:
                update(lambda: lm.model(input_ids=r.ids, labels=r.ids, use_cache=False).loss, lambda: torch.zeros(()))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/lora_memory.json"))
    args = parser.parse_args()
    if args.side:
        print(json.dumps(side(args.side)))
        return
    peaks = {}
    for name in ("plain", "npo-lora"):
        # Freed tensors go back to the system at once, so that the peak is that of what is held.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
        command = [sys.executable, __file__, "--side", name]
        said = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        peaks[name] = float(said.stdout.splitlines()[-1])
    result = {**peaks, "ratio": peaks["npo-lora"] / peaks["plain"]}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, result)
    print(result)


if __name__ == "__main__":
    main()
