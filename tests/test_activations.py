"""The activations that SAEs are trained on: which positions, in which order, from memory, passes or disk."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import D_MODEL
from streams import DISTINCT, TEXTS, slow_positions
from torch import Tensor

from sae_training.activations import Shuffle, capturing, positions, text_windows
from sae_training.cache import cached
from sae_training.config import SAEConfig
from sae_training.processes import Processes
from saeunlearn.corpus import Window, windows
from saeunlearn.errors import ConfigError, NonFiniteError, RunError
from saeunlearn.models import LanguageModel
from saeunlearn.progress import Progress


def which(got: Tensor, reference: Tensor) -> list[int]:
    """Index into `reference` [n, layers, d] of every row of `got` [layers, n, d]; each must be there to 1e-3."""
    exact = "donot_use_mm_for_euclid_dist"
    rows = got.transpose(0, 1).flatten(1)
    distance, index = torch.cdist(rows, reference.flatten(1), compute_mode=exact).min(1)
    assert float(distance.max()) < 1e-3
    return index.tolist()


def everything(lm: LanguageModel, items: list[Window], layers: list[int]) -> Tensor:
    out = torch.empty(len(layers), sum(map(positions, items)), D_MODEL)
    capturing(lm, items, layers)(range(len(items)), out)
    return out


def shuffle(lm: LanguageModel, *, batch: int, buffer: int, seed: int = 0, rank: int = 0, count: int = 1,
            capture: Any = None) -> Shuffle:  # fmt: skip
    items = windows(DISTINCT, lm)
    capture = capture or capturing(lm, items, [1])
    return Shuffle(items, capture, (1, D_MODEL), batch, buffer, seed, torch.device("cpu"), Processes(count, rank))


def take(s: Shuffle, n: int, step: int = 0) -> list[Tensor]:
    stream = s.from_step(step)
    return [next(stream) for _ in range(n)]


def test_every_position_but_the_first_in_order(lm: LanguageModel) -> None:
    items = windows(DISTINCT, lm)
    assert len({len(w.ids) for w in items}) > 4
    torch.testing.assert_close(
        everything(lm, items, [0, 2]).transpose(0, 1), slow_positions(lm, items, [0, 2]), atol=1e-4, rtol=1e-4
    )


def test_order_of_the_layers_is_the_callers(llama: LanguageModel) -> None:
    items = windows(DISTINCT, llama)
    assert torch.equal(everything(llama, items, [1, 3]), everything(llama, items, [3, 1]).flip(0))


def test_non_finite_activations_name_the_layer(llama: LanguageModel) -> None:
    with torch.no_grad():
        llama.writers([2])[0].weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="block 2"):
        everything(llama, windows(DISTINCT, llama), [1, 2, 3])


def test_an_epoch_in_memory_holds_each_position_once(llama: LanguageModel) -> None:
    reference = slow_positions(llama, windows(DISTINCT, llama), [1])
    n = len(reference)
    assert n % 2 == 0
    pairs = zip(*[iter(take(shuffle(llama, batch=n // 2, buffer=n, seed=5), 6))] * 2)
    epochs = [which(torch.cat(pair, dim=1), reference) for pair in pairs]
    assert all(sorted(e) == list(range(n)) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    again = which(torch.cat(take(shuffle(llama, batch=n // 2, buffer=n, seed=5), 2), dim=1), reference)
    other = which(torch.cat(take(shuffle(llama, batch=n // 2, buffer=n, seed=6), 2), dim=1), reference)
    assert again == epochs[0] != other
    # A batch that does not divide an epoch leaves the rest out of it: still no position twice.
    uneven = which(torch.cat(take(shuffle(llama, batch=n // 2 - 1, buffer=n), 2), dim=1), reference)
    assert len(set(uneven)) == len(uneven) == n - 2
    # More than there is: everything.
    assert take(shuffle(llama, batch=10 * n, buffer=n), 1)[0].shape[1] == n


def test_a_corpus_in_memory_is_computed_once(llama: LanguageModel) -> None:
    calls: list[int] = []
    plain = capturing(llama, windows(DISTINCT, llama), [1])
    s = shuffle(llama, batch=16, buffer=10**6, capture=lambda c, out: (calls.append(len(c)), plain(c, out)))
    take(s, 30)
    assert calls == [len(s.items)]


def test_a_corpus_larger_than_the_buffer_streams_through(llama: LanguageModel) -> None:
    items = windows(DISTINCT, llama)
    reference = slow_positions(llama, items, [1])
    n, batch, buffer = len(reference), 4, len(reference) // 3
    held: list[int] = []
    plain = capturing(llama, items, [1])

    def counting(chosen: Any, out: Tensor) -> None:
        held.append(out.shape[1])
        plain(chosen, out)

    s = shuffle(llama, batch=batch, buffer=buffer, capture=counting)
    steps = 8 * n // batch
    counts = [0] * n
    for h in take(s, steps):
        assert h.shape == (1, batch, D_MODEL)
        for i in which(h, reference):
            counts[i] += 1
    longest = max(map(positions, items))
    assert max(held) <= buffer + longest  # what is in memory
    epochs = -(-sum(held) // n)
    assert max(counts) <= epochs <= 10  # at most once in each epoch that was begun
    assert min(counts) >= 5  # and none is left behind
    assert torch.equal(take(s, 1)[0], take(shuffle(llama, batch=batch, buffer=buffer), 1)[0])
    assert not torch.equal(take(s, 1)[0], take(shuffle(llama, batch=batch, buffer=buffer, seed=1), 1)[0])


@pytest.mark.parametrize("buffer", [20, 10**6])
def test_any_step_can_be_gone_to(llama: LanguageModel, buffer: int) -> None:
    s = shuffle(llama, batch=4, buffer=buffer)
    whole = take(s, 40)
    for step in (0, 1, 7, 23, 39):
        assert torch.equal(take(s, 1, step)[0], whole[step])


@pytest.mark.parametrize("buffer", [40, 10**6])
def test_processes_share_the_same_batches(llama: LanguageModel, buffer: int) -> None:
    reference = slow_positions(llama, windows(DISTINCT, llama), [1])
    alone = take(shuffle(llama, batch=8, buffer=buffer), 12)
    parts = [take(shuffle(llama, batch=8, buffer=buffer, rank=r, count=3), 12) for r in range(3)]
    for step, batch in enumerate(alone):
        together = torch.cat([p[step] for p in parts], dim=1)
        assert sorted(which(together, reference)) == sorted(which(batch, reference))


# --- on disk -----------------------------------------------------------------------------------------------


def from_cache(lm: LanguageModel, folder: Path, dtype: str = "float32", capture: Any = None) -> Any:
    items = windows(DISTINCT, lm)
    capture = capture or capturing(lm, items, [1, 3])
    return cached(capture, folder, items, [1, 3], lm, DISTINCT.fingerprint(), dtype, Progress(), Processes())


def never(*_: Any) -> None:
    raise AssertionError("the model was asked again")


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 2e-2)])
def test_a_cache_gives_the_same_activations(
    llama: LanguageModel, tmp_path: Path, dtype: str, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sae_training.cache.SHARD_BYTES", 3000)
    items = windows(DISTINCT, llama)
    from_cache(llama, tmp_path / "cache", dtype)
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) > 2
    again = from_cache(llama, tmp_path / "cache", dtype, never)
    chosen = list(range(len(items)))
    random.Random(0).shuffle(chosen)
    got = torch.empty(2, sum(positions(items[i]) for i in chosen), D_MODEL)
    again(chosen, got)
    expected = slow_positions(llama, [items[i] for i in chosen], [1, 3]).transpose(0, 1)
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


def test_a_killed_cache_goes_on(llama: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae_training.cache.SHARD_BYTES", 3000)
    plain, calls = capturing(llama, windows(DISTINCT, llama), [1, 3]), 0

    def dying(chosen: Any, out: Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        plain(chosen, out)

    with pytest.raises(KeyboardInterrupt):
        from_cache(llama, tmp_path / "cache", capture=dying)
    done = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "cache").glob("*.safetensors")}
    assert len(done) == 2
    from_cache(llama, tmp_path / "cache")
    now = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "cache").glob("*.safetensors")}
    assert len(now) > 2
    assert {n: now[n] for n in done} == done


def test_foreign_and_damaged_caches_are_refused(llama: LanguageModel, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    from_cache(llama, folder)
    with pytest.raises(RunError, match="another model, data, layers or dtype"):
        from_cache(llama, folder, "bfloat16")
    with pytest.raises(ConfigError, match="float16"):
        from_cache(llama, tmp_path / "other", "float16")
    (shard,) = folder.glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(RunError, match="damaged"):
        from_cache(llama, folder)
    index = json.loads((folder / "activations.json").read_text())
    (folder / "activations.json").write_text(json.dumps(index)[:-5])
    with pytest.raises(RunError, match="damaged"):
        from_cache(llama, folder)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match="not empty"):
        from_cache(llama, tmp_path / "full")


def test_packed_rows_hold_the_whole_text_in_order(llama: LanguageModel) -> None:
    config = SAEConfig(context=16, pack=True)
    rows = text_windows(TEXTS, llama, config)
    assert all(len(w.ids) == 16 for w in rows[:-1])
    assert all(w.ids[0] == llama.bos_id for w in rows)
    end = llama.tokenizer.eos_token_id
    joined = [i for w in rows for i in w.ids[1:]]
    texts = [list(w.ids[1:]) for w in windows(TEXTS, llama)]
    wanted = texts[0] + [i for t in texts[1:] for i in ([end] if end is not None else []) + t]
    assert joined == wanted
    plain = text_windows(TEXTS, llama, SAEConfig(context=16))
    assert plain == windows(TEXTS, llama, 16)
    assert len(rows) < len(plain)
