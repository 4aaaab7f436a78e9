"""The notebooks of analysis/: what is committed is what their sources say, and every source runs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import nbformat
import pytest

ANALYSIS = Path(__file__).parents[1] / "analysis"
_spec = importlib.util.spec_from_file_location("build_notebooks", ANALYSIS / "build.py")
assert _spec is not None
assert _spec.loader is not None
build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(build)

SOURCES = {s.stem: s for s in build.sources()}
LARGEST = 4_000_000  # bytes of the whole folder


def code_cells(notebook: Any) -> list[Any]:
    return [c for c in notebook.cells if c.cell_type == "code"]


@pytest.mark.parametrize("name", SOURCES)
def test_what_is_committed_was_made_from_the_source_and_ran_to_its_end(name: str) -> None:
    kept = nbformat.read(SOURCES[name].with_suffix(".ipynb"), as_version=4)
    made = build.notebook_of(SOURCES[name])
    assert [(c.id, c.cell_type, c.source) for c in kept.cells] == [(c.id, c.cell_type, c.source) for c in made.cells]
    assert [c.execution_count for c in code_cells(kept)] == list(range(1, len(code_cells(kept)) + 1))
    assert not [o for c in code_cells(kept) for o in c.outputs if o.output_type == "error"]
    assert any("image/png" in o.get("data", {}) for c in code_cells(kept) for o in c.outputs) or "claims" in name
    assert build.stray(kept) == []
    assert all(set(c.metadata) <= {"tags"} for c in kept.cells)  # no times


def test_the_folder_is_small_and_holds_no_other_notebook() -> None:
    assert {f.stem for f in ANALYSIS.glob("*.ipynb")} == set(SOURCES)
    assert sum(f.stat().st_size for f in ANALYSIS.iterdir() if f.is_file()) < LARGEST


def test_ids_follow_from_the_cells_and_are_unique(tmp_path: Path) -> None:
    source = tmp_path / "a.py"
    source.write_text('# %% [markdown]\n# Text\n\n# %% tags=["picture-x"]\nprint(1)\n\n# %%\nprint(1)\n')
    first, again = build.notebook_of(source), build.notebook_of(source)
    assert [c.id for c in first.cells] == [c.id for c in again.cells]
    assert len({c.id for c in first.cells}) == 3
    assert [dict(c.metadata) for c in first.cells] == [{}, {"tags": ["picture-x"]}, {}]
    source.write_text(source.read_text().replace("# Text", "# Other text"))
    assert [c.id for c in build.notebook_of(source).cells][1:] == [c.id for c in first.cells][1:]


def test_what_others_are_not_to_see_is_found(tmp_path: Path) -> None:
    source = tmp_path / "a.py"
    source.write_text("# %%\nprint(1)\n")
    notebook = build.notebook_of(source)
    notebook.cells[0].outputs = [nbformat.v4.new_output("stream", name="stdout", text="fine\n")]
    assert build.stray(notebook) == []
    notebook.cells[0].outputs.append(nbformat.v4.new_output("stream", name="stderr", text="50%|###"))
    notebook.cells[0].outputs.append(nbformat.v4.new_output("stream", name="stdout", text=f"in {build.HERE}/x"))
    assert [found.split(" ")[0] for found in build.stray(notebook)] == ["stderr:", str(build.HERE.parent)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the notebooks run: what the first of them makes (the tiny world and its runs), the others find."""
    made = tmp_path_factory.mktemp("notebooks") / "project" / "analysis"
    made.mkdir(parents=True)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("name", SOURCES)
def test_every_notebook_runs_from_a_clean_kernel(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAEUNLEARN_NOTEBOOKS", "fast")
    monkeypatch.setenv("SAEUNLEARN_HOME", str(folder.parents[1] / "home"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = build.notebook_of(SOURCES[name])
    build.execute(notebook, folder)
    assert [c.execution_count for c in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))
    assert build.stray(notebook) == []
