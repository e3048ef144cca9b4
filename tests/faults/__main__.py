"""Write the table of `docs/reliability.md` from the docstrings of the cases."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from mochi_app.files import PROJECT_DIR

BEGIN, END = "<!-- faults -->\n", "<!-- /faults -->"


def cases() -> Iterator[tuple[str, str, str]]:
    """Area, harm and promise of every case, in the order of the files."""
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        area = path.stem.removeprefix("test_").replace("_", " ")
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if not node.name.startswith("test_"):
                continue
            harm, colon, promise = " ".join((ast.get_docstring(node) or "").split()).partition(": ")
            if not colon:
                raise ValueError(f"{path.name}::{node.name}: expected a docstring 'harm: promise'")
            yield area, harm, promise


def table() -> str:
    """The reliability table in Markdown."""
    rows = [f"| {area} | {harm} | {promise} |" for area, harm, promise in cases()]
    return "\n".join(["| | what happens | what is promised |", "| --- | --- | --- |", *rows])


if __name__ == "__main__":
    document = PROJECT_DIR / "docs" / "reliability.md"
    before, rest = document.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    document.write_text(f"{before}{BEGIN}{table()}\n{END}{after}", encoding="utf-8")
