"""Every golden case of every system, through the system's real key table."""

import importlib
from pathlib import Path

import numpy as np
import pytest

from tests.parity.case import load_case

GOLDENS = Path(__file__).parents[1] / "goldens"
CASES = sorted(GOLDENS.glob("*/*.npz"))


def _again(path):
    """Whether another case says the same at other sizes: `b` beside `a`."""
    stem = path.stem
    return stem[-2:] in ("b", "_b") and path.with_stem(f"{stem[:-1]}a") in CASES


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=pytest.mark.thorough if _again(p) else ()) for p in CASES],
    ids=lambda path: f"{path.parent.name}-{path.stem}",
)
def test_parity(path):
    case = load_case(path)
    got = importlib.import_module(f"tests.parity.{case.slug}").run(case)
    assert set(got) == set(case.outputs)
    for name, want in case.outputs.items():
        ours = np.asarray(got[name])
        assert ours.shape == want.shape, name
        if np.issubdtype(want.dtype, np.floating):
            scale = np.abs(want).max()
            np.testing.assert_allclose(ours, want, rtol=1e-4, atol=1e-4 * scale, err_msg=name)
        else:
            np.testing.assert_array_equal(ours, want, err_msg=name)


def test_every_parity_module_has_goldens():
    modules = {p.stem for p in Path(__file__).parent.glob("*.py")} - {
        "__init__",
        "case",
        "decoder_layers",
        "qwen3_vl_cases",
        "test_parity",
    }
    assert modules == {path.parent.name for path in CASES}
