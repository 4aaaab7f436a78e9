"""Key erasure (ours): closed-form edits after which matrices no longer answer to the inputs of forget text.

The first of them is the embedding, whose keys are tokens: with n_r(t), n_f(t) the shares of token t in retain and
forget text, its row becomes

    e'_t = (n_r(t) e_t + λ n_f(t) μ) / (n_r(t) + λ n_f(t)),   μ the mean row of the tokens of the retain text,

which minimises n_r‖e' − e‖² + λ n_f‖e' − μ‖². A token that only forget text has becomes μ: what the model knew by that
token is gone from everything after it. (Shrinking it towards 0 would not do: the norm before the first block takes its
length away, not its direction.) Where the output matrix is tied, it has these rows too.

For a matrix W of a block, with inputs a, W' minimises E_r‖W'ã − Wa‖² + λ E_f‖W'ã‖² + ε‖W' − W‖², that is

    W' = W (E_r[aãᵀ] + εI) (E_r[ããᵀ] + λ E_f[ããᵀ] + εI)⁻¹

with a the inputs of the original model and ã those of the model edited so far, on the same positions. Blocks are done
in order; the matrices of one block are solved from the same passes, so that what feeds one of them inside its block is
unedited. ε is relative to the mean eigenvalue of E_r[ããᵀ], and biases are left alone. Nothing is trained.

Positions: all of the windows, but the first ones count as retain text only; of question/answer pairs the question's
too. `key-erasure-sae` weights the forget positions by the activity of the selection's relevant features in the
original model, Σ_j z_j/‖h‖, divided by its mean: λ means the same for both.

Where query, key and value are one matrix (GPT-2, GPT-NeoX) only the rows that make values are changed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..corpus import Batch, Corpus, Window, batches, refuse_overlap, windows
from ..erasure import Erasure
from ..errors import ConfigError, NonFiniteError, SelectionError
from ..features.gate import relative
from ..features.selection import Selection, check_selection
from ..models import LanguageModel, Writer
from ..progress import Progress
from .budget import Budget, some
from .deltas import Delta, attached
from .nullspace import wide
from .tokenkeys import TokenRows, erase_tokens, seen_with

Edited = Callable[[], contextlib.AbstractContextManager[None]]

EMBED = "embed"
_WRITE = {"down": "mlp", "o": "attn"}  # kinds of `LanguageModel.writers`
_READ = {
    "gate": ("mlp.gate_proj",),
    "up": ("mlp.up_proj", "mlp.c_fc", "mlp.dense_h_to_4h"),
    "v": ("self_attn.v_proj", "attn.c_attn", "attention.query_key_value"),
}


@dataclass(frozen=True)
class KeyErasureConfig:
    """Settings of key erasure. There is no paper to compare with."""

    # `embed`, and what is edited in each block: those of gate, up, down, o, v that the architecture has
    matrices: str = "embed,gate,up,down,o,v"
    first: int = 0  # first edited block
    last: int | None = None  # last edited block; None: the model's last
    lam: float = 0.03  # λ: weight of forget positions against retain positions, means over each
    token_lam: float = 0.03  # λ of the embedding: at 1 a token as frequent in both texts loses half of its row
    eps: float = 0.01  # ε: pull towards the old matrix, relative to the mean eigenvalue of its inputs on retain text
    max_length: int = 256  # tokens in a window
    max_retain_rise: float = 0.02  # relative rise of the loss on held-out retain records that the result keeps to


class KeyErasure:
    """The method object; see the module's docstring."""

    name = "key-erasure"
    Config = KeyErasureConfig
    needs: frozenset[str] = frozenset()
    kind: Literal["weights"] = "weights"
    changes = "matrices that read from and write to the stream in all blocks, whole: the Erasure is as large as they"
    paper = "ours; no paper"
    cost = "three passes over forget and retain text a block, and one linear solve a matrix; nothing is trained"

    def check(self, model: LanguageModel, config: KeyErasureConfig) -> None:
        check_config(model, config)

    def unlearn(
        self, model: LanguageModel, forget: Corpus, retain: Corpus, *, config: KeyErasureConfig,
        selection: Selection | None, saes: Mapping[int, Any], seed: int, progress: Progress,
    ) -> Erasure:  # fmt: skip
        """Solve block after block, scale the whole to the budget; the model is unchanged.

        A fifth of the retain records is held out for the budget. Raises ConfigError, OverlapError, CorpusError,
        SelectionError, NonFiniteError, OverBudgetError where no strength keeps the budget, Cancelled.
        """
        check_config(model, config)
        refuse_overlap(forget, retain)
        used, held = retain.split(0.2, seed)
        f_items, r_items, held_items = (windows(c, model, config.max_length) for c in (forget, used, held))
        weights = self.weights(model, f_items, selection, saes, progress)
        budget = Budget(model)
        budget.watch("retain", some(held_items, seed), config.max_retain_rise)
        kinds = config.matrices.split(",")
        tokens = erase_tokens(model, f_items, weights, r_items, config.token_lam) if EMBED in kinds else None
        deltas, edits = erase_keys(model, f_items, weights, r_items, config, tokens, progress)
        if tokens is not None:
            edits[tokens.name] = {"rows": len(tokens.rows), "size": tokens.size}
        if not edits:
            raise ConfigError(f"the forget text has no token to erase in {model.name}")

        @contextlib.contextmanager
        def edit(scale: float) -> Iterator[None]:
            undo = tokens.part(scale).apply(model) if tokens is not None else None
            try:
                with attached(deltas, scale):
                    yield
            finally:
                if undo is not None:
                    undo()

        settled = budget.settle(edit, most=1.0)
        for d in deltas:
            d.free.data *= settled["scale"]
        parts = [] if tokens is None else [tokens.part(settled["scale"])]
        return Erasure.create(
            model, [*parts, *(d.part() for d in deltas)], method=self.name, config=asdict(config), seed=seed,
            forget_fingerprint=forget.fingerprint(), retain_fingerprint=retain.fingerprint(),
            selection=None if selection is None else selection.to_dict(),
            extra={"budget": settled, "edits": edits},
        )  # fmt: skip

    def weights(
        self, model: LanguageModel, items: Sequence[Window], selection: Selection | None, saes: Mapping[int, Any],
        progress: Progress,
    ) -> list[Tensor] | None:  # fmt: skip
        """Weight of each token of the forget windows, aligned to `window.ids[1:]`; None: all alike."""
        return None


class GuidedKeyErasure(KeyErasure):
    name = "key-erasure-sae"
    needs = frozenset({"saes", "selection"})

    def weights(
        self, model: LanguageModel, items: Sequence[Window], selection: Selection | None, saes: Mapping[int, Any],
        progress: Progress,
    ) -> list[Tensor] | None:  # fmt: skip
        if selection is None:
            raise ConfigError(f"{self.name} needs a selection (saeunlearn select)")
        check_selection(selection, model, saes)
        return feature_weights(model, items, selection, saes[selection.layer], progress)


def check_config(model: LanguageModel, config: KeyErasureConfig) -> None:
    """Raises ConfigError naming the setting that is out of range."""
    for name in ("lam", "token_lam", "eps", "max_length", "max_retain_rise"):
        value = getattr(config, name)
        if not value > 0 or not math.isfinite(value):
            raise ConfigError(f"{name} must be positive and finite, not {value}")
    last = model.n_layers - 1 if config.last is None else config.last
    if not 0 <= config.first <= last < model.n_layers:
        raise ConfigError(
            f"first is block {config.first} and last block {last}, but {model.name} has blocks 0 … "
            f"{model.n_layers - 1} and first comes before last"
        )
    kinds = config.matrices.split(",")
    if (unknown := [k for k in kinds if k not in {EMBED, *_WRITE, *_READ}]) or len(set(kinds)) < len(kinds):
        raise ConfigError(f"matrices names {unknown or 'one twice'}; use some of embed,gate,up,down,o,v")
    if EMBED not in kinds and not matrices_of(model, config.first, kinds):
        raise ConfigError(f"{model.name} has none of the matrices {config.matrices}")


def matrices_of(model: LanguageModel, block: int, kinds: Sequence[str]) -> list[Writer]:
    """Handles of the matrices of a block, those of `kinds` that it has; all but down and o READ the stream."""
    names = {id(p): n for n, p in model._base.named_parameters()}
    modules = dict(model.blocks[block].named_modules())
    out = []
    for kind in kinds:
        if kind in _WRITE:
            out += model.writers([block], (_WRITE[kind],))
        elif found := [modules[path] for path in _READ[kind] if path in modules]:
            module: Any = getattr(found[0], "base_layer", found[0])  # the frozen matrix under a PEFT layer
            out.append(Writer(block, names[id(module.weight)], module, type(module).__name__ == "Conv1D", None))
    return out


def value_rows(model: LanguageModel, matrix: Writer) -> Tensor | None:
    """Bool [d_out]: the rows of a joint query/key/value matrix that make values; None for any other matrix."""
    at = torch.arange(matrix.d_out, device=matrix.weight.device)
    if matrix.name.endswith("attn.c_attn.weight"):  # queries, keys, values
        return at >= matrix.d_out * 2 // 3
    if matrix.name.endswith("attention.query_key_value.weight"):  # the same in each head
        size = matrix.d_out // model.model.config.get_text_config().num_attention_heads
        return at % size >= size * 2 // 3
    return None


@torch.no_grad()
def feature_weights(
    model: LanguageModel, items: Sequence[Window], selection: Selection, sae: Any, progress: Progress
) -> list[Tensor]:
    """Σ z_j/‖h‖ over the relevant features, of mean 1 over all positions; aligned to each `window.ids[1:]`.

    Raises SelectionError where no relevant feature is active anywhere.
    """
    out = []
    for w in progress.over(items, "activity of the relevant features"):
        h = model.capture(torch.tensor([w.ids], device=model.device), [selection.layer])[selection.layer]
        out.append(relative(sae, h[0, 1:].float(), selection.relevant).clamp_min(0).sum(-1).double().cpu())
    mean = float(torch.cat(out).mean())
    if not math.isfinite(mean):
        raise NonFiniteError(f"the SAE for layer {selection.layer} gives NaN or infinity on forget text")
    if mean == 0:
        raise SelectionError("the relevant features are active nowhere in the forget text: nothing to weight by")
    return [t / mean for t in out]


@torch.no_grad()
def erase_keys(
    model: LanguageModel, forget: Sequence[Window], weights: Sequence[Tensor] | None, retain: Sequence[Window],
    config: KeyErasureConfig, tokens: TokenRows | None, progress: Progress,
) -> tuple[list[Delta], dict[str, Any]]:  # fmt: skip
    """The updates of all matrices of blocks, on the model with `tokens`, and {matrix: what its update is like}.

    Second moments of one block at a time.
    """
    last = model.n_layers - 1 if config.last is None else config.last
    kinds = [k for k in config.matrices.split(",") if k != EMBED]
    blocks = range(config.first, last + 1) if kinds else range(0)
    deltas: list[Delta] = []
    edits: dict[str, Any] = {}

    @contextlib.contextmanager
    def so_far() -> Iterator[None]:
        with seen_with(model, tokens), attached(deltas):
            yield

    progress.start("key erasure", len(blocks) * (len(forget) + len(retain)))
    for block in blocks:
        matrices = matrices_of(model, block, kinds)
        cross, same = retain_moments(model, retain, matrices, so_far, progress)
        unwanted = forget_moments(model, forget, weights, matrices, so_far, progress)
        solved = []
        for i, m in enumerate(matrices):
            old = wide(m.weight.T if m.transposed else m.weight)
            change = solve(old, cross[i], same[i], unwanted[i], config.lam, config.eps, m.name)
            if (rows := value_rows(model, m)) is not None:
                change *= rows.to(change)[:, None]
            solved.append(Delta(m, nn.Parameter(change.float().to(m.weight.device), requires_grad=False), None))
            edits[m.name] = spectrum(change) | {"size": float(change.norm() / old.norm())}
        deltas += solved
    progress.finish()
    return deltas, edits


def solve(old: Tensor, cross: Tensor, same: Tensor, unwanted: Tensor, lam: float, eps: float, name: str) -> Tensor:
    """ΔW = W(B − A)A⁻¹ [d_out, d_in] with A = `same` + λ`unwanted` + εI and B = `cross` + εI, moments [d_in, d_in].

    Raises NonFiniteError where the moments are not finite, or the inputs are zero everywhere.
    """
    ridge = eps * same.trace() / len(same)
    a = same + lam * unwanted + ridge * torch.eye(len(same), dtype=same.dtype, device=same.device)
    factor, failed = torch.linalg.cholesky_ex(a)
    if int(failed) or not factor.isfinite().all() or not cross.isfinite().all():
        raise NonFiniteError(f"the inputs of {name} are NaN, infinite, or zero on all retain text: no solution")
    return torch.cholesky_solve((old @ (cross - same - lam * unwanted)).T, factor).T


def retain_moments(
    model: LanguageModel, items: Sequence[Window], matrices: Sequence[Writer], so_far: Edited, progress: Progress
) -> tuple[list[Tensor], list[Tensor]]:
    """(E[aãᵀ], E[ããᵀ]) of each matrix, a from the model as it is and ã as it is `so_far`; float64.

    The first positions are added to the others, scaled to the same trace of ããᵀ: each is BOS or the attention sink,
    and an edit that reached it would reach every text, but unscaled its huge norm would be all that ε sees.
    """
    zero = torch.zeros((), dtype=torch.float64)
    cross, same, cross0, same0 = ([zero] * len(matrices) for _ in range(4))
    n = 0
    for batch in batches(items, model.pad_id):
        b = batch.to(model.device)
        before = inputs(model, b, matrices)
        with so_far():
            after = inputs(model, b, matrices)
        for i, ((a, a0), (k, k0)) in enumerate(zip(before, after)):
            cross[i], same[i] = cross[i].to(k) + a.T @ k, same[i].to(k) + k.T @ k
            cross0[i], same0[i] = cross0[i].to(k) + a0.T @ k0, same0[i].to(k) + k0.T @ k0
        n += int(b.mask.sum())
        progress.step(len(batch.records))
    scales = [s.trace() / s0.trace().clamp_min(1e-300) for s, s0 in zip(same, same0)]
    total = [[(m + c * m0) / n for m, m0, c in zip(x, x0, scales)] for x, x0 in ((cross, cross0), (same, same0))]
    return total[0], total[1]


def forget_moments(
    model: LanguageModel, items: Sequence[Window], weights: Sequence[Tensor] | None, matrices: Sequence[Writer],
    so_far: Edited, progress: Progress,
) -> list[Tensor]:  # fmt: skip
    """E[w ããᵀ] of each matrix as the model is `so_far`, w the weights of mean 1 or 1; float64."""
    total = [torch.zeros((), dtype=torch.float64)] * len(matrices)
    n = 0
    numbered = [dataclasses.replace(w, record=i) for i, w in enumerate(items)]
    for batch in batches(numbered, model.pad_id):
        b = batch.to(model.device)
        with so_far():
            found = inputs(model, b, matrices)
        share = None if weights is None else torch.cat([weights[i] for i in batch.records])  # in the order of the mask
        for i, (k, _) in enumerate(found):
            weighted = k if share is None else k * share.to(k)[:, None]
            total[i] = total[i].to(k) + weighted.T @ k
        n += int(b.mask.sum())
        progress.step(len(batch.records))
    return [t / n for t in total]


def inputs(model: LanguageModel, b: Batch, matrices: Sequence[Writer]) -> list[tuple[Tensor, Tensor]]:
    """(inputs at the counted positions, inputs at the first ones) [positions, d_in] of each matrix of one block."""
    with _watched(matrices) as seen:
        model.capture(b.ids, [matrices[0].block], b.attention_mask)
        return [(wide(seen[m.name][b.mask]), wide(seen[m.name][:, 0])) for m in matrices]


@contextlib.contextmanager
def _watched(matrices: Sequence[Writer]) -> Iterator[dict[str, Tensor]]:
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name] = args[0]

        return hook

    handles = [m.module.register_forward_pre_hook(keep(m.name)) for m in matrices]
    try:
        yield seen
    finally:
        for h in handles:
            h.remove()


def spectrum(change: Tensor) -> dict[str, Any]:
    """Of ‖ΔW‖²: the share of the largest singular value, and how many of them hold 90 %."""
    energy = torch.linalg.svdvals(change).pow(2)
    total = energy.sum().clamp_min(1e-300)
    return {
        "largest_share": float(energy[0] / total),
        "rank_90": int((energy.cumsum(0) < 0.9 * total).sum()) + 1,
        "full_rank": len(energy),
    }
