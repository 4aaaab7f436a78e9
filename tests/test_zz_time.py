import time


def test_a(micro):
    pass


def test_b(finished):
    import json

    print(sorted(str(p.relative_to(finished.root)) for p in finished.root.rglob("*")))
    print((finished.root / "run.json").read_text())
    print((finished.root / "events.jsonl").read_text()[:1500])
    print(finished.erasure_id)
    from saeunlearn.evaluation.evaluate import table

    print(table(json.loads((finished.root / "evaluation.json").read_text())["comparison"]))
    print([(r["layer"], r["scores"]) for r in json.loads((finished.root / "selection.json").read_text())["layers"]])
    for e in finished.events:
        if e["event"] in ("start", "finish"):
            print(e["time"] - finished.events[0]["time"], e["event"], e["what"])
