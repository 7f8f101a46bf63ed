"""The form that every notebook keeps, so that who has read one knows where to look in the next."""

import ast
import re
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
WALK = [
    "00_start_here",
    "01_io_shapes",
    "02_stft_frames_and_buffer",
    "03_sigma_schedule",
    "04_score_statistics",
    "05_one_step_at_a_time",
    "06_training_loop",
    "07_listen_and_stream",
    "08_failure_gallery",
    "09_scale_up",
]
PATHS = sorted(FOLDER.glob("*.ipynb"))
SET_UP = re.compile(r"bench = open_workbench\(CONFIG, DATA[,)]")
ABSOLUTE = re.compile(r"""["'(\s](?:/(?:home|root|tmp|usr|work|mnt|data)/|[A-Z]:\\|~/)""")

notebooks = pytest.mark.parametrize(
    "notebook",
    [pytest.param(nbformat.read(path, as_version=4), id=path.stem) for path in PATHS],
)


@pytest.fixture
def stem(request):
    """The name of the notebook under test."""
    return request.node.callspec.id


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def markdown(notebook):
    return [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]


def imported(tree):
    """The dotted name of every module that a cell imports, and of what it takes from it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_the_walk_is_complete():
    assert [path.stem for path in PATHS] == WALK


@notebooks
def test_first_cell_has_title_question_needs(notebook, stem):
    head = markdown(notebook)[0]
    assert notebook.cells[0].cell_type == "markdown"
    assert re.match(rf"# {stem[:2]} \w", head), "no title '# NN Title' in the first line"
    for line in ("**Question:** ", "**Needs:** "):
        assert line in head, f"the first cell has no {line}"
    question = head.split("**Question:** ")[1].split("\n\n")[0]
    assert "?" in question, "the question asks nothing"


@notebooks
def test_previous_and_next_are_linked(notebook, stem):
    head = markdown(notebook)[0]
    place = WALK.index(stem)
    for word, other in (("Previous", place - 1), ("Next", place + 1)):
        link = re.search(rf"{word}: \[(\d\d) [^\]]+\]\(([^)]+)\)", head)
        if not 0 <= other < len(WALK):
            assert link is None, f"{stem} has no {word.lower()} notebook"
        else:
            assert link, f"the first cell has no '{word}: [NN Title](file)'"
            assert link.groups() == (WALK[other][:2], f"{WALK[other]}.ipynb")


@notebooks
def test_links_to_files_lead_somewhere(notebook):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", "\n".join(markdown(notebook)))
    assert not [link for link in links if not (FOLDER / link).exists()]


@notebooks
def test_first_code_cell_opens_the_workbench(notebook):
    """Other data or another config is a change of two lines, and they are at the top."""
    source = code_cells(notebook)[0].source
    assert re.search(r'^CONFIG = "configs/\w+\.yaml"', source, re.MULTILINE)
    assert re.search(r'^DATA = "data/DN-LM-demo"', source, re.MULTILINE)
    assert SET_UP.search(source), "no bench = open_workbench(CONFIG, DATA)"
    assert source.rstrip().endswith("print(bench)")
    later = [cell.source for cell in code_cells(notebook)[1:]]
    assert not [cell for cell in later if "DN-LM-demo" in cell], "the demo set is named again"


@notebooks
def test_number_and_length_of_code_cells(notebook):
    lengths = [len(cell.source.splitlines()) for cell in code_cells(notebook)]
    assert 10 <= len(lengths) <= 25
    assert max(lengths[1:]) <= 15, "a cell over 15 lines: move it to the library"
    short = sum(length <= 6 for length in lengths)
    assert short > len(lengths) / 2, "most cells have 1 to 6 lines"


@notebooks
def test_no_cell_is_empty(notebook):
    assert not [cell.id for cell in notebook.cells if not cell.source.strip()]


@notebooks
def test_checks_are_announced_and_say_what_is_wrong(notebook):
    checks = [
        follower
        for cell, follower in zip(notebook.cells, notebook.cells[1:], strict=False)
        if cell.cell_type == "markdown" and cell.source.startswith("**Check:**")
    ]
    assert len(checks) >= 3, "a notebook without checks is a demo"
    for cell in checks:
        asserts = [n for n in ast.walk(ast.parse(cell.source)) if isinstance(n, ast.Assert)]
        assert asserts, f"{cell.id} follows **Check:** and asserts nothing"


@notebooks
def test_every_assert_has_a_message(notebook):
    for cell in code_cells(notebook):
        for node in ast.walk(ast.parse(cell.source)):
            assert not isinstance(node, ast.Assert) or node.msg, f"{cell.id}: {ast.unparse(node)}"


@notebooks
def test_functions_and_classes_live_in_the_library(notebook):
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for cell in code_cells(notebook):
        found = [node.name for node in ast.walk(ast.parse(cell.source)) if isinstance(node, kinds)]
        assert not found, f"{cell.id} defines {found}"


@notebooks
def test_no_shell_no_pyplot_no_interact(notebook):
    """A shell command outlives a cell's time limit, pyplot is not thread-safe, interact is blank
    in a page without widgets."""
    for cell in code_cells(notebook):
        assert not re.search(r"^\s*[!%]", cell.source, re.MULTILINE), f"{cell.id}: ! or %"
        for name in imported(ast.parse(cell.source)):
            assert not re.search(r"pyplot|pylab|interact|tqdm|^subprocess", name), name


@notebooks
def test_no_absolute_paths(notebook):
    for cell in notebook.cells:
        assert not ABSOLUTE.search(cell.source), f"{cell.id}: {ABSOLUTE.search(cell.source)}"


@notebooks
def test_outputs_are_stripped_but_for_kept_tables(notebook):
    for cell in code_cells(notebook):
        tags = set(cell.metadata.get("tags", []))
        kept = "keep_output" in tags
        assert kept == ("nbval-check-output" in tags), f"{cell.id}: kept tables are compared"
        assert kept == bool(cell.outputs), f"{cell.id}: output and tag keep_output go together"
        for output in cell.outputs:
            mimes = set(output.get("data", {})) | {output.get("name", "stdout")}
            assert mimes <= {"text/plain", "stdout"}, f"{cell.id} keeps more than small text"
            assert len(str(output)) < 4000, f"{cell.id} keeps more than a small table"


@notebooks
def test_metadata_is_stripped(notebook):
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    assert set(notebook.metadata.language_info) == {"name"}
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"tags"}, f"{cell.id}: {dict(cell.metadata)}"
    counts = {cell.id: cell.execution_count for cell in code_cells(notebook) if not cell.outputs}
    assert not [name for name, count in counts.items() if count is not None]


@notebooks
def test_last_section_sums_up(notebook):
    last = markdown(notebook)[-1]
    assert notebook.cells[-1].cell_type == "markdown"
    assert "## What was learned\n" in last
    assert "**Try:**" in last
    assert re.search(r"`[a-z_]+\.[a-z_.]+", last), "names no config key to change"


@notebooks
def test_prose_is_about_twice_the_code(notebook):
    """Between as many words as code has and four times as many."""
    words = sum(len(text.split()) for text in markdown(notebook))
    code = sum(len(re.findall(r"\w+", cell.source)) for cell in code_cells(notebook))
    assert 0.4 * code <= words <= 4 * code, f"{words} words of prose, {code} of code"
