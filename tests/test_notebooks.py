"""The notebooks: their two forms agree, and each runs from its first cell to its last, on little data."""

import os
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

from tests.pretrained import tiny
from tests.xla import flags

ROOT = Path(__file__).parents[1]
SMALL = "from tests.small_recipes import small_recipe\njaxmm.load_recipe = small_recipe\n"
SETTINGS = {
    "search_photos": f"{SMALL}COUNT, STEPS, SCENES = 40, 2, 'scenes:tiny/'",
    "finetune_on_folder": "STEPS, BATCH, IMAGES, START = 4, 8, (3, 4), '{models}/clip'",
    "train_blip_on_scenes": f"{SMALL}STEPS, EVALUATIONS, POOL, CAPTIONED, SCENES = 2, 1, 20, 8, 'scenes:tiny/'",
    "clean_crawl_captions": f"{SMALL}COMPARED_STEPS, WEB, BATCH, LONGEST, POOL, THRESHOLD = 2, 20, 8, 9, 20, 0\n"
                            "CAPTIONER, FILTER, SCENES = '{models}/captioner', '{models}/matcher', 'scenes:tiny/'",
    "eight_devices": f"{SMALL}STEPS, RECIPE, TOPOLOGY, BATCH, LARGE = 2, 'vit_folder', 'h100:4', 4, 'clip_b32'",
}
"""Lines behind the parameters of each notebook, for a run of seconds."""
FIGURES = {"search_photos": 8, "finetune_on_folder": 6, "train_blip_on_scenes": 8, "clean_crawl_captions": 4,
           "eight_devices": 4}
"""The least number of figures that a notebook shows."""


def test_every_notebook_is_run_and_linked():
    names = {path.stem for path in (ROOT / "notebooks").glob("*.py")}
    readme = (ROOT / "README.md").read_text()
    assert names == set(SETTINGS) == {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert all(f"(notebooks/{name}.ipynb)" in readme for name in names)


@pytest.mark.parametrize("name", SETTINGS)
def test_source_and_notebook_agree(name):
    """`jupytext --update --to ipynb notebooks/*.py` writes the notebooks again."""
    source, notebook = (jupytext.read(ROOT / "notebooks" / f"{name}.{ending}") for ending in ("py", "ipynb"))
    for cell in (*source.cells, *notebook.cells):
        cell.id = ""                                            # drawn at random
    assert [cell.source for cell in source.cells] == [cell.source for cell in notebook.cells]
    assert source.cells == notebook.cells and not any(cell.get("outputs") for cell in notebook.cells)
    assert source.metadata.kernelspec == notebook.metadata.kernelspec


def execute(name, folder, settings=None):
    """Run a notebook in a kernel of its own, whose temporary files are in `folder`; return it with its outputs."""
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    if settings is not None:
        [place] = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ())]
        notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(settings))
    (folder / "tmp").mkdir()
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "" if settings is None else flags(None),
                        "TMPDIR": str(folder / "tmp"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    NotebookClient(notebook, timeout=1800, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
                   ).execute(env=env)
    return notebook


def check(notebook, name, folder):
    """Check that it showed figures, warned of nothing, and wrote into its own temporary folder only."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    warned = "".join(output.text for output in outputs if output.get("name") == "stderr")
    assert not [line for line in warned.splitlines() if line and not line.startswith("Drawing the data set scenes")]
    assert sum("image/png" in output.get("data", ()) for output in outputs) >= FIGURES[name]
    assert [path.name for path in folder.iterdir()] == ["tmp"]
    assert all(path.name.startswith("jaxmm-") or path.name.endswith("tfds") for path in (folder / "tmp").iterdir())


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Small models of random weights."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("clip", "captioner", "matcher"):
        getattr(tiny, name)().save(folder / name)
    return folder


@pytest.mark.parametrize("name", SETTINGS)
def test_a_notebook_runs_on_little_data(name, models, tmp_path):
    check(execute(name, tmp_path, SETTINGS[name].format(models=models)), name, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("name", SETTINGS)
def test_a_notebook_runs_as_it_is(name, tmp_path):
    check(execute(name, tmp_path), name, tmp_path)
