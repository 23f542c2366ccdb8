"""Grade the notebooks that a class handed in, without nbgrader.

    python -m exercises.grade handed_in                     all notebooks in a folder, and below it
    python -m exercises.grade ada.ipynb bob.ipynb --jobs 4

prints a line for each notebook, and writes them to a table, build/grades.csv: the points, and what
each failed check said. Notebooks that are in the table and have not changed are not run again.
"""

import argparse
import csv
import hashlib
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from exercises import release
from exercises.grading import Grade, companions, grade
from exercises.records import FOLDER, load

TABLE = Path("build/grades.csv")
HEAD = ("notebook", "set", "points", "of", "not graded", "odd")
TAIL = ("fingerprint",)
Row = dict[str, str]


def notebooks(places: list[Path]) -> list[Path]:
    """The notebooks that are named, and those in the folders that are; none that is hidden."""
    found: dict[Path, None] = {}
    for place in places:
        below = sorted(place.rglob("*.ipynb")) if place.is_dir() else [place]
        hidden = [any(part[0] == "." for part in path.relative_to(place).parts) for path in below]
        found |= dict.fromkeys(p for p, h in zip(below, hidden, strict=True) if not h)
    return list(found)


def ours() -> bytes:
    """A fingerprint of what grades: when it changes, everything is graded anew."""
    files = [*FOLDER.rglob("*.py"), *FOLDER.rglob("solutions_*.ipynb")]
    return hashlib.sha256(b"".join(map(_digest, sorted(files)))).digest()


def fingerprint(path: Path, ours: bytes) -> str:
    """What a grade depends on: the notebook, what lies beside it, our part; "" if unreadable."""
    try:
        parts = [_digest(file) for file in [path, *companions(path)]]
    except OSError:
        return ""
    return hashlib.sha256(b"".join([ours, *parts])).hexdigest()[:16]


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def row_of(path: Path, result: Grade, mark: str) -> Row:
    """A notebook's row in the table."""
    row = dict(notebook=str(path), set=result.number, odd="; ".join(result.odd), fingerprint=mark)
    if result.failed:
        return {**row, "not graded": result.failed}
    full = sum(release.POINTS[e.tier] for e in load(result.number).EXERCISES)
    row |= dict(points=str(sum(result.points.values())), of=str(full))
    for name, points in result.points.items():
        row[name] = str(points)
        row[f"{name} says"] = result.says[name]
    return row


def line_of(row: Row) -> str:
    """A notebook's line on the screen, and one more for what is odd."""
    if row["not graded"]:
        return f"{row['notebook']}  not graded: {row['not graded']}"
    each = "  ".join(f"{name}: {row[name]}" for name in _exercises([row]))
    line = f"{row['notebook']}  {each}  sum: {row['points']} of {row['of']}"
    return f"{line}\n    odd: {row['odd']}" if row["odd"] else line


def _exercises(rows: list[Row]) -> list[str]:
    """The exercises that have points in one of the rows, "03.1" and so on."""
    names = {name.removesuffix(" says") for row in rows for name in row if name.endswith(" says")}
    return sorted(name for name in names if any(row.get(name) for row in rows))


def read_table(path: Path) -> dict[str, Row]:
    """The rows of a table by notebook; none, if there is no table yet. Errors: ValueError."""
    if not path.exists():
        return {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        table = csv.DictReader(file)
        if not {*HEAD, *TAIL} <= {*(table.fieldnames or ())}:
            raise ValueError(f"{path} is no table of grades; name another with --table")
        return {row["notebook"]: row for row in table}


def write_table(path: Path, rows: list[Row]) -> None:
    """Write the table; a grader that is stopped leaves the old one or the new one."""
    each = [column for name in _exercises(rows) for column in (name, f"{name} says")]
    half = path.with_name(f"{path.name}.half")
    path.parent.mkdir(parents=True, exist_ok=True)
    with half.open("w", encoding="utf-8-sig", newline="") as file:  # as spreadsheets read it
        table = csv.DictWriter(file, [*HEAD, *each, *TAIL], restval="", extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)
    half.replace(path)


def grade_all(paths: list[Path], table: Path, jobs: int) -> Iterator[Row]:
    """Each notebook's row as soon as it is known; the table is written after each."""
    rows = read_table(table)
    part = ours()
    marks = {path: fingerprint(path, part) for path in paths}
    known = [p for p in paths if is_known(rows.get(str(p)), marks[p])]
    yield from (rows[str(path)] for path in known)
    pool = ThreadPoolExecutor(jobs)
    try:
        running = {pool.submit(grade, path): path for path in paths if path not in known}
        for done in as_completed(running):
            path = running[done]
            rows[str(path)] = row_of(path, done.result(), marks[path])
            write_table(table, [rows[name] for name in sorted(rows)])
            yield {**dict.fromkeys(HEAD, ""), **rows[str(path)]}
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def is_known(row: Row | None, mark: str) -> bool:
    """Whether a notebook was graded before, by the same checks, and has not changed since."""
    return bool(row and mark and row["fingerprint"] == mark and not row["not graded"])


def main() -> None:
    """Grade the notebooks that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="+", type=Path, help="notebooks, or folders of them")
    parser.add_argument("--table", type=Path, default=TABLE, help=f"default: {TABLE}")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="at a time")
    arguments = parser.parse_args()
    try:
        read_table(arguments.table)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    paths = notebooks(arguments.notebooks)
    rows = []
    try:
        for row in grade_all(paths, arguments.table, max(1, arguments.jobs)):
            rows.append(row)
            print(line_of(row), flush=True)
    except KeyboardInterrupt:
        sys.exit(f"stopped after {len(rows)} of {len(paths)}: the same command goes on from here")
    failed = sum(bool(row["not graded"]) for row in rows)
    print(f"{len(rows) - failed} graded, {failed} not; what each check said: {arguments.table}")


if __name__ == "__main__":
    main()
