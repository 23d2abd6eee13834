from dataclasses import replace

import jax
import numpy as np
import pytest

import zoo
from tests.models.draw import draw
from tests.train.tiny import TinyConfig, find_here, tiny
from zoo.convert.place import abstract_params, flat_paths
from zoo.models.core.errors import UsageError
from zoo.processors import ImageProcessor, Processor, Tokenizer
from zoo.saving import read_description, save_model
from zoo.train.config import Start
from zoo.train.loop import train
from zoo.train.mesh import MeshConfig, make_mesh
from zoo.train.start import starting_tokenizer, starting_variables


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """A folder with a tiny model, and its parameters."""
    config = zoo.config("llava_tiny")
    params = draw(abstract_params(config))
    processor = Processor(ImageProcessor(16), Tokenizer.train(["which digit?"], 300), 24)
    folder = save_model(tmp_path_factory.mktemp("llava") / "model", config, params, processor, {})
    return str(folder), flat_paths(params)


def begun(starts, fresh, name="mqt_tiny", said=None, **changes):
    config = replace(zoo.config(name), **changes)
    mesh = make_mesh(MeshConfig(fsdp=2))
    say = (lambda text: None) if said is None else said.append
    boxed = abstract_params(config)
    params, stats = starting_variables(starts, fresh, config, boxed, {}, mesh, 5, say)
    assert stats == {}
    return flat_paths(params)


def test_all_but_the_fresh_is_taken_and_lies_on_the_mesh(llava):
    folder, theirs = llava
    decoder = zoo.config("llava_tiny").decoder
    said = []
    found = begun((Start(folder),), ("connector/.*",), decoder=decoder, said=said)
    for path, leaf in found.items():
        if not path.startswith("connector"):
            np.testing.assert_array_equal(leaf, theirs[path])
        assert leaf.dtype == np.float32
        assert len(leaf.sharding.device_set) == 8
    assert {path for path in found if path.startswith("connector")} > {"connector/queries"}
    assert float(np.abs(found["connector/queries"]).max()) > 0
    assert f"parameters are taken from {folder}" in said[0]


def test_a_part_of_a_model_goes_where_it_is_said(llava):
    folder, theirs = llava
    starts = (Start(folder, below="tower", into="tower"), Start(folder, "decoder", "decoder"))
    decoder = zoo.config("llava_tiny").decoder
    found = begun(starts, ("connector/.*",), decoder=decoder)
    for path in ("tower/patch/kernel", "decoder/embedding/embedding"):
        np.testing.assert_array_equal(found[path], theirs[path])
    assert Start("x", "vision", "tower").place("vision/patch/kernel") == "tower/patch/kernel"
    assert Start("x", "vision", "tower").place("visions/kernel") is None
    assert Start("x", into="decoder").place("head/kernel") == "decoder/head/kernel"


def test_what_a_start_does_not_give_is_listed(llava):
    folder, _ = llava
    with pytest.raises(UsageError, match=r"(?s)connector/\S+ is not there\n.*\.\.\. and \d+ more"):
        begun((Start(folder),), (), decoder=zoo.config("llava_tiny").decoder)
    deeper = r"layers/down/kernel is \(2, 32, 24\) there, want \(3, 32, 24\)"
    with pytest.raises(UsageError, match=deeper):
        begun((Start(folder),), ("connector/.*",))
    with pytest.raises(UsageError, match=r"'conector/\.\*' matches no parameter; there are conn"):
        begun((), ("conector/.*",))


def test_a_run_begins_where_another_has_ended(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("zoo.models.core.codec._find", find_here)
    optim = replace(tiny().optim, warmup=0)
    first = train(tiny(steps=2, optim=optim), tmp_path / "a")
    start = (Start(str(tmp_path / "a")),)
    seen = []

    def on_eval(model, params, step):
        seen.append(jax.device_get(params))
        return {}

    # The optimizer hardly moves anything: what is there after a step was there before.
    still = replace(optim, lr=1e-12, weight_decay=0.0)
    experiment = tiny(steps=1, optim=still, start=start, fresh=("up/kernel",), seed=3, save_every=1)
    train(experiment, tmp_path / "b", on_eval=on_eval)
    for name in ("embedding", "down", "norm"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), seen[0][name],
                     jax.device_get(first.params)[name])  # fmt: skip
    assert np.abs(seen[0]["up"]["kernel"] - first.params["up"]["kernel"]).max() > 0.01
    assert "3 of 4 parameters are taken from" in capsys.readouterr().err
    assert read_description(tmp_path / "b" / "model").about["start"] == [start[0].source]
    # Once begun, a run needs its start no more, and is refused another.
    (tmp_path / "a").rename(tmp_path / "c")
    assert train(experiment, tmp_path / "b").complete
    with pytest.raises(UsageError, match=r"start.*source"):
        train(replace(experiment, start=(Start("elsewhere"),)), tmp_path / "b")


def test_fresh_parameters_want_a_start(tmp_path):
    with pytest.raises(UsageError, match="where there is no start"):
        train(tiny(fresh=("up/.*",)), tmp_path)


def test_the_tokenizer_comes_with_the_model(llava, tmp_path):
    folder, _ = llava
    known = starting_tokenizer((Start(str(tmp_path)), Start(folder)))
    assert known.vocab_size == Processor.load(folder).tokenizer.vocab_size
    assert starting_tokenizer((Start("organisation/name"),)) is None
    built = tiny().processor.build(TinyConfig(), tiny().data, known)
    assert built.tokenizer is known
