"""Execute the notebooks and write them with their outputs: python analysis/build.py [NAME …]

The source of a notebook is the script NAME.py in jupytext's percent format; NAME.ipynb beside it is made from it and
holds the outputs of the full setting. What is written depends on the source and the outputs alone: no times, no random
ids, no versions. A cell with the tag `picture-X` also leaves its picture in docs/images/X.png, for the README.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import os
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
IMAGES = HERE.parent / "docs/images"
TIMEOUT = 3600  # seconds a cell may take


def sources() -> list[Path]:
    """The scripts of all notebooks, in order."""
    return sorted(HERE.glob("[0-9][0-9]_*.py"))


def notebook_of(source: Path) -> Any:
    """The notebook of a script, not executed; the id of a cell follows from its content and its place among equals."""
    import jupytext

    notebook = jupytext.reads(source.read_text(encoding="utf-8"), fmt="py:percent")
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    seen: set[str] = set()
    for cell in notebook.cells:
        n = 0
        while (name := hashlib.sha256(f"{n} {cell.source}".encode()).hexdigest()[:8]) in seen:
            n += 1
        seen.add(name)
        cell["id"] = name
        cell.metadata = {"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {}
    return notebook


def execute(notebook: Any, folder: Path) -> None:
    """Run all cells in a new kernel that starts in `folder`. Raises nbclient's CellExecutionError."""
    from nbclient import NotebookClient

    client = NotebookClient(
        notebook, timeout=TIMEOUT, kernel_name="python3", record_timing=False, coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )  # fmt: skip
    # Without ipywidgets tqdm warns that it cannot draw bars; nothing here draws any.
    client.execute(env={**os.environ, "PYTHONWARNINGS": "ignore:IProgress"})
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)


def stray(notebook: Any) -> list[str]:
    """What must not be in outputs: warnings and progress, and folders of this machine."""
    private = {str(Path.home()), str(HERE.parent), os.environ.get("USER", "")} - {"", "/", "root"}
    found = []
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if output.output_type == "stream" and output.name == "stderr":
                found.append(f"stderr: {output.text[:300]}")
            text = str(output.get("text", "")) + str(output.get("data", {}).get("text/plain", ""))
            found += [f"{p} in: {text[:300]}" for p in sorted(private) if p in text]
    return found


def save_pictures(notebook: Any) -> None:
    """The pictures of tagged cells. Raises ValueError for a tagged cell that shows none."""
    for cell in notebook.cells:
        for tag in cell.metadata.get("tags", ()):
            if tag.startswith("picture-"):
                shown = [o.data["image/png"] for o in cell.outputs if "image/png" in o.get("data", {})]
                if not shown:
                    raise ValueError(f"the cell tagged {tag} shows no picture")
                (IMAGES / f"{tag.removeprefix('picture-')}.png").write_bytes(base64.b64decode(shown[-1]))


def main() -> int:
    import nbformat

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="how their names begin (default: all)")
    args = parser.parse_args()
    chosen = [s for s in sources() if not args.names or s.stem.startswith(tuple(args.names))]
    if not chosen:
        parser.error(f"no notebook begins with {' or '.join(args.names)}")
    for source in chosen:
        started = time.monotonic()
        notebook = notebook_of(source)
        execute(notebook, HERE)
        if wrong := stray(notebook):
            print(f"{source.name}: not for others to see:\n" + "\n".join(wrong), file=sys.stderr)
            return 1
        save_pictures(notebook)
        nbformat.validate(notebook)
        nbformat.write(notebook, source.with_suffix(".ipynb"))
        print(f"{source.stem}: {time.monotonic() - started:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
