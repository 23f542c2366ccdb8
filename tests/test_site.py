"""The site's sources, without Sphinx and without a browser: what is on it, and what stays out.

tests/browser/test_site.py looks at the built pages.
"""

import ast
import json
import re
import sys

import pytest
import yaml

from tests.test_project import ROOT, repository_files

sys.path.insert(0, str(ROOT / "site"))

import alt_text  # noqa: E402  they lie in the folder that was named just now
import build  # noqa: E402
import course  # noqa: E402
import lessons  # noqa: E402
import links  # noqa: E402
import maps  # noqa: E402

NOTEBOOKS = course.notebooks()
SETS = course.sets()
READ = {path: course.read(path) for path in [*NOTEBOOKS, *SETS]}


def stem(path) -> str:
    return path.stem


def prose(nb) -> str:
    return "\n\n".join(cell.source for cell in nb.cells if cell.cell_type == "markdown")


# --- what is on it ---


def test_the_sidebar_lists_every_notebook_and_set_once_and_in_order():
    listed = [line for line in build.contents().splitlines() if re.match(r"[\w/]+$", line)]
    numbered = [name for name in listed if re.match(r"(notebooks|exercises)/\d\d_", name)]
    files = sorted(ROOT.glob("notebooks/*.ipynb")) + sorted(ROOT.glob("exercises/*/exercises_*"))
    assert numbered == [path.relative_to(ROOT).with_suffix("").as_posix() for path in files]
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=stem)
def test_a_notebooks_part_is_the_one_that_the_readme_puts_it_in(path):
    before = course.README.read_text("utf-8").split(f"(notebooks/{path.name}) |")[0]
    assert re.findall(r"^\*\*(Part I+),", before, re.M)[-1] == course.part_of(path)


def test_the_first_page_has_the_readmes_tables_and_its_picture():
    page = build.index_page()
    for path in [*NOTEBOOKS, *SETS]:
        assert f"({path.relative_to(ROOT).as_posix()})" in page
    assert "(notebooks/query_reads.png)" in page
    assert "{" not in page.replace(":::{toctree}", "")  # every place was filled


# --- pictures ---


@pytest.mark.parametrize("path", [*NOTEBOOKS, *SETS], ids=stem)
def test_every_picture_has_words(path):
    nb = lessons.prepared(path)
    for number, cell in enumerate(nb.cells):
        if any("image/png" in output.get("data", {}) for output in cell.get("outputs", [])):
            words = cell.metadata["mystnb"]["image"]["alt"]
            assert "see the code" not in words, f"{path.stem}, cell {number}: no words at all"
            assert 15 < len(words) < 600 and "\n" not in words, f"cell {number}: {words}"


def test_words_for_a_picture_by_hand():
    chart = 'ax.plot(x, y, label="dense: T")\nax.set(xlabel="tokens", title=f"one of {n}")'
    assert alt_text.described(chart) == "Figure: one of …; across: tokens; shown: dense: T."
    drawn = 'plots.draw_block_map(config, ids, "group 0")'
    assert alt_text.described(drawn) == (
        "Queries down, blocks across: what each query of one group reads. group 0."
    )
    assert alt_text.described("boxes(ax)", "Six boxes.\nMore") == "Figure: Six boxes."


# --- exercises ---


@pytest.mark.parametrize("path", SETS, ids=stem)
def test_a_set_has_each_solution_folded_and_no_hidden_test(path):
    page = lessons.exercise_set(path)
    text = "\n".join(cell.source for cell in page.cells)
    assert "HIDDEN" not in text and "hidden_check" not in text and "SOLUTION" not in text
    answers = lessons.answers_of(course.solutions_of(path))
    numbers = re.findall(r"^## \d\d\.\d ", prose(READ[path]), re.M)
    assert len(answers) >= len(numbers) >= 3
    for answer in answers.values():
        where = [cell.source for cell in page.cells if answer in cell.source]
        assert len(where) == 1 and where[0].startswith("<details><summary>A solution</summary>\n\n")
    added = [cell for cell in page.cells if cell.source.startswith("<details><summary>A solution")]
    assert len(added) == len(answers)
    assert len(page.cells) == len(READ[path].cells) + len(answers)


@pytest.mark.parametrize("path", SETS, ids=stem)
def test_a_solution_stands_below_its_own_exercise(path):
    text = "\n".join(cell.source for cell in lessons.exercise_set(path).cells)
    for exercise in re.split(r"^(?=## \d\d\.\d )", text, flags=re.M)[1:]:
        asked, _, given = exercise.partition("<details><summary>A solution")
        functions = r"^(?:def|class) (\w+)[^\n]*\n(?:    .*\n|\n)*?    # YOUR CODE HERE"
        for name in re.findall(functions, asked, re.M):
            assert re.search(rf"^(def|class) {name}\b", given, re.M), exercise[:40]


# --- explorers ---


def test_recorded_explorers_take_the_place_of_their_pictures():
    path = ROOT / "notebooks/14_see_the_selection.ipynb"
    page = lessons.lesson(path)
    html = "".join(
        output.data.get("text/html", "")
        for cell in page.cells
        for output in cell.get("outputs", [])
        if "data" in output
    )
    framed = re.findall(r'<iframe [^>]*src="\.\./explorers/(\w+)\.html" title="[^"]+"', html)
    assert len(framed) >= 2
    assert html.count('<noscript><img alt="query ') == len(framed)  # for those without scripts
    for name in framed:
        assert (ROOT / f"notebooks/recorded/{name}.npz").exists()
    pictures = [
        sum("image/png" in o.get("data", {}) for c in nb.cells for o in c.get("outputs", []))
        for nb in (READ[path], page)
    ]
    assert pictures[0] - pictures[1] == len(framed)  # what is drawn live keeps its picture


# --- maps ---


def test_the_map_has_every_equation_of_the_paper():
    assert [equation["number"] for equation in maps.equations()] == list(range(1, 13))


@pytest.mark.parametrize("equation", maps.equations(), ids=lambda e: f"Eq. {e['number']}")
def test_an_equations_lines_hold_the_function_that_is_named(equation):
    assert any(path.name.startswith(equation["notebook"]) for path in NOTEBOOKS)
    for place in (*equation["reference"], *equation["loop"], *equation["kernel"]):
        path, (first, last) = maps.lines_of(place)
        lines = path.read_text("utf-8").splitlines()
        assert re.match(rf"(def|class) {place.split(':')[1]}\b", lines[first - 1])
        ast.parse("\n".join(lines[first - 1 : last]))  # the whole of it, and nothing torn
        assert maps.code_link(place).count(f"{path.relative_to(ROOT)}#L{first}-L{last}") == 1


@pytest.mark.parametrize("equation", maps.equations()[6:], ids=lambda e: f"Eq. {e['number']}")
def test_a_function_of_the_map_says_that_it_is_this_equation(equation):
    said = set()
    for place in equation["reference"]:
        path, (first, last) = maps.lines_of(place)
        text = "\n".join(path.read_text("utf-8").splitlines()[first - 1 : last])
        for low, high in re.findall(r"\bEq\. (\d+)(?:-(\d+))?", text):
            said |= set(range(int(low), int(high or low) + 1))
    assert equation["number"] in said


def test_a_function_that_has_gone_is_an_error():
    with pytest.raises(LookupError, match=r"nsa_lite/gates\.py has no gone"):
        maps.lines_of("nsa_lite/gates.py:gone")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=stem)
def test_the_map_of_skills_has_what_a_notebook_promises(path):
    skills = maps.skills_of(path)
    assert 3 <= len(skills) <= 4
    page = maps.skills_page()
    for skill in skills:
        assert f"\n- {links.rewritten(skill, path.parent, ROOT)}\n" in page


# --- links and addresses ---


def test_links_lead_to_pages_and_else_to_the_repository():
    folder = ROOT / "notebooks"
    file = f"{links.repository()}/blob/main/nsa_lite/gates.py"
    for written, wanted in {
        "[03](03_selection.ipynb)": "[03](03_selection.ipynb)",
        "[a](../nsa_lite/gates.py)": f"[a]({file})",
        "[a](../nsa_lite)": f"[a]({links.repository()}/tree/main/nsa_lite)",
        "[a](../benchmarks/NOTES.md#versions)": "[a](../benchmarks/NOTES.md#versions)",
        "[a](https://arxiv.org/abs/2502.11089)": "[a](https://arxiv.org/abs/2502.11089)",
        "[a](#here)": "[a](#here)",
        "`k[0](03.py)`": "`k[0](03.py)`",
        "[s](../exercises/03_selection/solutions_03.ipynb)": (
            "[s](../exercises/03_selection/exercises_03.ipynb)"
        ),
    }.items():
        assert links.rewritten(written, folder) == wanted
    assert links.rewritten("[03](03_selection.ipynb)", folder, ROOT) == (
        "[03](notebooks/03_selection.ipynb)"
    )


def test_the_readmes_badges_have_the_address_of_pyproject():
    assert f"\n{links.badges()}\n" in course.README.read_text("utf-8"), (
        f"put these two lines into the README:\n{links.badges()}"
    )


def test_the_address_stands_nowhere_else():
    naming = [
        path.relative_to(ROOT).as_posix()
        for path in repository_files()
        if links.owner_and_name().encode() in path.read_bytes()
    ]
    assert sorted(naming) == ["README.md", "pyproject.toml"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=stem)
def test_colabs_copy_is_the_notebook_and_one_cell_that_installs(path):
    copy = lessons.colab_copy(path)
    original = READ[path]
    assert [*copy.cells[:1], *copy.cells[2:]] == original.cells
    assert links.repository() in copy.cells[1].source
    assert (copy.metadata.get("accelerator") == "GPU") == (course.part_of(path) == "Part II")


# --- publishing ---


def test_the_workflow_builds_with_make_and_pushes_the_branch_that_colab_reads():
    workflow = yaml.safe_load((ROOT / ".github/workflows/site.yml").read_text("utf-8"))
    steps = workflow["jobs"]["publish"]["steps"]
    assert {"run": "make site"} in steps
    push = next(step["run"] for step in steps if "git push" in step.get("run", ""))
    assert push.rstrip().endswith(f" {links.SITE_BRANCH}") and ".nojekyll" in push


def test_the_devcontainer_sets_up_as_make_does():
    container = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text("utf-8"))
    assert container["image"].endswith("python:3.11")
    assert container["postCreateCommand"] == "make .venv/ready"


# --- the glossary ---


def terms() -> dict[str, str]:
    """Each term of the glossary, and its explanation."""
    text = (ROOT / "site/glossary.md").read_text("utf-8")
    body = re.search(r":::\{glossary\}\n(.+?)\n:::", text, re.S)[1]
    return dict(entry.split("\n  ") for entry in body.split("\n\n"))


def test_the_glossary_is_sorted_and_says_each_term_in_few_words():
    found = terms()
    assert len(found) >= 40
    assert list(found) == sorted(found, key=str.lower)
    for term, words in found.items():
        assert words.endswith(".") and len(words.split()) <= 50, term


def test_every_term_is_a_word_of_the_course():
    text = "\n".join(prose(nb) for nb in READ.values()).lower()
    unused = [term for term in terms() if term.lower() not in text]
    assert not unused
