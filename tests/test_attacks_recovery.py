"""The recovered share and the split into facts to attack with and facts to test on."""

from __future__ import annotations

import numpy as np
import pytest

from saeunlearn.corpus import Corpus, Record
from saeunlearn.errors import ConfigError
from saeunlearn.evaluation.attacks.battery import known_attacks
from saeunlearn.evaluation.attacks.case import fact_of, make_case
from saeunlearn.evaluation.attacks.recovery import Recovery, recovered
from saeunlearn.models import LanguageModel
from saeunlearn.progress import Progress

ONES = [1.0] * 10
ORIGINAL = [1.0] * 9 + [0.0]  # .9
ORACLE = [1.0] * 3 + [0.0] * 7  # .3
AFTER = [1.0] * 6 + [0.0] * 4  # .6
CHANCE = [0.25] * 10


def test_the_share_by_hand() -> None:
    assert recovered(AFTER, ORIGINAL, ORACLE, CHANCE, ONES).share == pytest.approx((0.6 - 0.3) / (0.9 - 0.3))
    assert recovered(AFTER, ORIGINAL, None, CHANCE, ONES).share == pytest.approx((0.6 - 0.25) / (0.9 - 0.25))
    assert recovered(ORIGINAL, ORIGINAL, ORACLE, CHANCE, ONES) == Recovery(1.0, 1.0, 1.0)
    assert recovered(ORACLE, ORIGINAL, ORACLE, CHANCE, ONES) == Recovery(0.0, 0.0, 0.0)


def test_chance_and_below_earn_nothing() -> None:
    lucky_oracle = [0.0] * 10  # below chance: guessing must not look like knowledge
    at_chance = [1.0, 1.0, 0.5] + [0.0] * 7
    assert recovered(at_chance, ORIGINAL, lucky_oracle, CHANCE, ONES).share == pytest.approx(0.0)
    assert recovered([0.0] * 10, ORIGINAL, ORACLE, CHANCE, ONES).share == 0.0
    assert recovered(AFTER, ORIGINAL, lucky_oracle, CHANCE, ONES).share == pytest.approx(0.35 / 0.65)


def test_where_the_oracle_ends_at_the_original_nothing_can_be_said() -> None:
    assert recovered(AFTER, ORIGINAL, ORIGINAL, CHANCE, ONES) == Recovery(None, None, None)


def test_losses_count_by_tokens() -> None:
    tokens = [1.0, 3.0]
    share = recovered([-2.0, -4.0], [-1.0, -1.0], [-5.0, -5.0], None, tokens).share
    assert share == pytest.approx((5 - (2 + 3 * 4) / 4) / (5 - 1))


def test_the_interval_is_that_of_a_slow_paired_bootstrap() -> None:
    rng = np.random.default_rng(1)
    after, original, oracle = (rng.random(60) < p for p in (0.6, 0.95, 0.3))
    found = recovered(list(after), list(original), list(oracle), [0.25] * 60, [1.0] * 60, seed=3)
    other = np.random.default_rng(99)
    shares = []
    for _ in range(3000):
        i = other.integers(0, 60, 60)
        r = max(oracle[i].mean(), 0.25)
        shares.append(max(0.0, (after[i].mean() - r) / (original[i].mean() - r)))
    assert found.low == pytest.approx(np.percentile(shares, 2.5), abs=0.03)
    assert found.high == pytest.approx(np.percentile(shares, 97.5), abs=0.03)
    assert found == recovered(list(after), list(original), list(oracle), [0.25] * 60, [1.0] * 60, seed=3)


# --- T and V -----------------------------------------------------------------------------------------------


def world(n: int = 8) -> tuple[Corpus, Corpus, Corpus]:
    forget, questions = [], []
    for i in range(n):
        meta = {"set": "forget", "entity": f"E{i // 2}", "attribute": "ab"[i % 2]}
        frames = (f"E{i // 2} {meta['attribute']} gives", f"What does E{i // 2} {meta['attribute']} give? It is")
        forget += [Record(text=f"{f} v{i}.", meta=meta) for f in frames]
        questions += [
            Record(question=f, answer=f"v{i}", choices=(f"v{i}", "x", "y"), meta={**meta, "phrasing": p})
            for f, p in zip(frames, ("seen", "held_out"))
        ]
    kept = Record(question="The sky is", answer="blue", choices=("blue", "red"), meta={"set": "near"})
    retain = [Record(text="The sky is blue.", meta={"set": "far"}), Record(text="A cat sat.", meta={"set": "near"})]
    return Corpus(tuple(forget)), Corpus(tuple(retain)), Corpus((*questions, kept))


@pytest.mark.parametrize("seed", range(4))
def test_no_phrasing_of_a_fact_of_t_is_in_v(llama: LanguageModel, seed: int) -> None:
    forget, retain, questions = world()
    case = make_case(llama, forget, retain, questions, "quick", seed, Progress())
    assert case.known is not None
    train, known, test = ({fact_of(r) for r in c} for c in (case.train, case.known, case.test))
    assert train == known
    assert (len(train), len(test)) == (2, 6)
    assert not train & test
    assert {len(c) for c in (case.train, case.known)} == {4}  # both phrasings of each
    assert [r.meta["set"] for r in case.unrelated] == ["far"]
    assert case.retain_questions is not None
    assert [r.answer for r in case.retain_questions] == ["blue"]
    assert case.chance == [1 / 3] * 12


def test_without_fields_every_record_is_a_fact_of_its_own(llama: LanguageModel) -> None:
    _, retain, _ = world()
    questions = Corpus(tuple(Record(question=f"Q{i}?", answer=f"a{i}", choices=(f"a{i}", "b")) for i in range(8)))
    case = make_case(llama, Corpus.of(["Something else."]), retain, questions, "quick", 0, Progress())
    assert case.known is not None
    assert case.train.records == case.known.records  # no forget record is on one of the facts
    assert {r.id for r in case.train} | {r.id for r in case.test} == {r.id for r in questions}
    texts = make_case(llama, Corpus.of([f"Text {i}." for i in range(8)]), retain, None, "quick", 0, Progress())
    assert (texts.metric, len(texts.train), len(texts.test)) == ("nll", 2, 6)


def test_bad_input_is_refused(llama: LanguageModel) -> None:
    forget, retain, _ = world()
    with pytest.raises(ConfigError, match="3 forget facts"):
        make_case(llama, Corpus(forget.records[:6]), retain, None, "quick", 0, Progress())
    with pytest.raises(ConfigError, match="budget 'huge'"):
        make_case(llama, forget, retain, None, "huge", 0, Progress())
    with pytest.raises(ConfigError, match="unknown attacks \\['magic'\\]"):
        known_attacks(["int4", "magic"])
    assert known_attacks(["int4", "none"]) == ["none", "int4"]
