"""SAEs with known answers, a model with a planted topic, and small corpora."""

from __future__ import annotations

import re
from typing import Any

import torch
from conftest import D_MODEL, SENTENCES
from torch import Tensor

from saeunlearn.corpus import Corpus
from saeunlearn.models import LanguageModel

FORGET = Corpus.of(SENTENCES[:12], "forget")
RETAIN = Corpus.of([s.replace("keeps", "sold").replace("river", "station") for s in SENTENCES[12:32]], "retain")

# In `planted` only digits reach the first N_PLANTED dimensions of the stream, and are otherwise embedded like "#". The
# retain texts are the forget texts with "#" for every digit: nothing else tells the two apart.
N_PLANTED = 3
DIGITS = Corpus.of(
    [s[: 24 + i] + n for i, (s, n) in enumerate(zip(SENTENCES, ("123", "4567", "89012", "34567890", "12", "9")))],
    "digits",
)
PLAIN = Corpus.of([re.sub(r"\d", "#", r.text) for r in DIGITS], "plain")


def topk_sae(layer: int = 0, *, d_sae: int = 96, k: int = 6, seed: int = 0, d_in: int = D_MODEL, hook: str = "") -> Any:
    """A random TopK SAE with unit decoder rows, a tied encoder and biases that are not zero."""
    from sae_lens import TopKSAE, TopKSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    hook = hook or f"blocks.{layer}.hook_resid_post"
    sae = TopKSAE(TopKSAEConfig(d_in=d_in, d_sae=d_sae, k=k, metadata=SAEMetadata(model_name="tiny", hook_name=hook)))
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(d_sae, d_in, generator=g)
    sae.W_dec.data = rows / rows.norm(dim=-1, keepdim=True)
    sae.W_enc.data = sae.W_dec.data.T.contiguous()
    sae.b_enc.data = 0.1 * torch.randn(d_sae, generator=g)
    sae.b_dec.data = 0.1 * torch.randn(d_in, generator=g)
    return sae.requires_grad_(False).eval()


def exact_sae(layer: int = 0, columns: Tensor | None = None, d_in: int = D_MODEL) -> Any:
    """An SAE that reconstructs every stream h = M c: features j and d + j are the two signs of c_j.

    `columns`: M [d, d], invertible with columns of norm 1; the identity without it.
    """
    m = torch.eye(d_in) if columns is None else columns
    sae = topk_sae(layer, d_sae=2 * d_in, k=d_in, d_in=d_in)
    sae.W_dec.data = torch.cat([m.T, -m.T]).contiguous()
    coordinates = torch.linalg.inv(m).T
    sae.W_enc.data = torch.cat([coordinates, -coordinates], dim=1).contiguous()
    sae.b_enc.data.zero_()
    sae.b_dec.data.zero_()
    return sae


def rotation(seed: int, d: int = D_MODEL) -> Tensor:
    return torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed)))[0]


def oblique(seed: int, d: int = D_MODEL) -> Tensor:
    """Unit columns that are independent but far from orthogonal."""
    m = rotation(seed, d) + 0.15 * torch.randn(d, d, generator=torch.Generator().manual_seed(seed + 1))
    return m / m.norm(dim=0)


def blind_sae(layer: int) -> Any:
    """`exact_sae` without the dimensions that `planted` reserves."""
    sae = exact_sae(layer)
    sae.W_enc.data[:N_PLANTED] = 0
    sae.W_dec.data[:, :N_PLANTED] = 0
    return sae


def planted_value(digit: int) -> float:
    """Small, so that the norms of the blocks hardly let the other dimensions know."""
    return 0.05 * (1 + digit / 9)


def planted(lm: LanguageModel) -> LanguageModel:
    """The Llama with its first N_PLANTED dimensions reserved: digits are embedded there, and no block writes there.

    After every block the stream of a digit is therefore its `planted_value` in each, and that of other tokens 0.
    """

    def token(text: str) -> int:
        (only,) = lm.tokenizer(text, add_special_tokens=False).input_ids
        return only

    with torch.no_grad():
        embedding = lm.model.get_input_embeddings().weight
        embedding[:, :N_PLANTED] = 0
        for digit in range(10):
            embedding[token(str(digit))] = embedding[token("#")]
            embedding[token(str(digit)), :N_PLANTED] = planted_value(digit)
        for w in lm.writers(range(lm.n_layers), ("mlp", "attn")):
            w.weight[:N_PLANTED] = 0
    return LanguageModel(lm.model, lm.tokenizer, "planted")
