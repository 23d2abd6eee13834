"""The notebooks: valid, without outputs, and executed from the first cell to the last."""

import base64
import io
import os

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

from tests.conftest import REPO

NOTEBOOKS = sorted((REPO / "colabs").glob("*.ipynb"))
FEW = """
STEPS, PICTURES, VALIDATION_PICTURES, OUT = 2, 16, 2, "run"

from dataclasses import replace
from zoo.configs import digits_vqa

tiny = digits_vqa.config()
tower, optim = replace(tiny.model.tower, depth=1), replace(tiny.optim, name="adamw")
model = replace(tiny.model, tower=tower, policies=())
tiny = replace(tiny, model=model, optim=optim, parts=(), batch_size=4)
digits_vqa.config = lambda: tiny
"""
PLAIN = """
import rich.console

# Progress as text: the client of the tests sometimes misses the end of a cell with a widget in it.
rich.console._is_jupyter = lambda: False
"""
TINY = {
    "01_quickstart.ipynb": """
STEPS, PICTURES, VALIDATION_PICTURES, OUT = 3, 24, 8, "run"

from dataclasses import replace
from zoo.configs import digits_vqa, digits_vqa_tiny
from zoo.train.objectives import NextToken

tiny = replace(digits_vqa_tiny.config(), eval_examples=0, objective=NextToken((2, 4), masked=True))
digits_vqa.config = lambda: tiny
""",
    "02_convert_and_generate.ipynb": """
MODEL, WORK = None, "run"

import tests.live.reference  # declares what a torchvision for the CPU lacks
""",
    "03_matryoshka_budgets.ipynb": FEW,
    "04_mixture_of_depths.ipynb": FEW,
    "05_deepstack.ipynb": FEW,
    "06_shard_and_plan.ipynb": """
STEPS, OUT, DEPTH, TOPOLOGY = 2, "run", 1, "cpu:8"
MESHES = {"one copy each": {"data": 8}, "divided": {"data": 2, "fsdp": 2, "tensor": 2}}

from dataclasses import replace
from zoo.configs import digits_vqa_tiny, llava_1_5_7b

tiny = digits_vqa_tiny.config()
llava_1_5_7b.config = lambda: tiny
""",
    "08_token_reduction.ipynb": FEW + 'METHODS, KEEP = ("random", "fastv"), (4,)\n',
    "07_vision_backbones.ipynb": """
NAMES, LOOK, SECONDS = ("swin_tiny", "inceptionnext_tiny"), "swin_tiny", 0.01
SIZES = {"img_size": 16, "patch_size": 2, "embed_dim": 8, "depths": (2, 1), "num_heads": (2, 4)}
ORIGINAL = (
    "swin_tiny_patch4_window7_224",
    {**SIZES, "window_size": 4, "mlp_ratio": 2.0, "num_classes": 5},
)

import tests.live.reference  # declares what a torchvision for the CPU lacks
""",
}
"""What stands in the cell with parameters when the tests run it."""

PICTURES = {
    "01_quickstart.ipynb": [True, True, False],
    "02_convert_and_generate.ipynb": [False],
    "03_matryoshka_budgets.ipynb": [True, True, True],
    "04_mixture_of_depths.ipynb": [True, True],
    "05_deepstack.ipynb": [True, True, True],
    "06_shard_and_plan.ipynb": [True, True, True],
    "07_vision_backbones.ipynb": [True, True],
    "08_token_reduction.ipynb": [True, True, False, True],
}
"""Of the pictures that each shows, whether they are wide."""


def test_every_notebook_is_tested():
    assert {path.name for path in NOTEBOOKS} == set(TINY)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_form(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert notebook.metadata.kernelspec.name == "python3"


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_execution(path, tmp_path, monkeypatch):
    # The kernel is another process, on one device.
    flags = os.environ.get("XLA_FLAGS", "").split()
    kept = [flag for flag in flags if "force_host_platform_device_count" not in flag]
    monkeypatch.setenv("XLA_FLAGS", " ".join(kept))
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    notebook = nbformat.read(path, as_version=4)
    (parameters,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", ())]
    parameters.source = PLAIN + TINY[path.name]
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    shown = [
        Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))).width
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if "image/png" in output.get("data", {})
    ]
    assert [width > 600 for width in shown] == PICTURES[path.name]
