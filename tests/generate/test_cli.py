"""`zoo generate`: any picture file, one clear line for whatever cannot be done."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

import zoo
from tests.models.draw import draw
from zoo.cli import main
from zoo.loaded import Loaded
from zoo.processors import ImageProcessor, Processor, Tokenizer
from zoo.saving import save_model

PROMPT = "which digit?"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = zoo.config("mqt_tiny")
    shapes = jax.eval_shape(config.build().init, jax.random.key(0), config.inputs(1))["params"]
    processor = Processor(ImageProcessor(16), Tokenizer.train([PROMPT], 300), 20)
    folder = tmp_path_factory.mktemp("run")
    save_model(folder / "model", config, draw(shapes), processor, {"step": 1})
    return folder


def ask(capsys, run, image, *flags, prompt=PROMPT):
    argv = ["generate", str(run), "--image", str(image), "--prompt", prompt, *flags]
    try:
        status = main([*argv, "--max-new-tokens", "4"])
    except SystemExit as ended:
        status = ended.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture
def picture(tmp_path):
    """The same picture in forms that cameras and scanners write."""
    rng = np.random.default_rng(0)
    plain = Image.fromarray(rng.integers(0, 256, (30, 30, 3), np.uint8))

    def file(kind):
        path = tmp_path / f"{kind}.{'jpg' if kind in ('cmyk', 'rotated') else 'png'}"
        if kind == "cmyk":
            plain.convert("CMYK").save(path)
        elif kind == "deep":
            Image.fromarray(rng.integers(0, 65536, (30, 30), np.uint16)).save(path)
        elif kind == "palette":
            plain.convert("P").save(path)
        elif kind == "rotated":
            exif = Image.Exif()
            exif[0x0112] = 6
            plain.save(path, exif=exif)
        else:
            plain.save(path)
        return path

    return file


@pytest.mark.parametrize("kind", ["plain", "cmyk", "deep", "palette", "rotated"])
def test_any_picture_is_answered(capsys, run, picture, kind):
    status, out, err = ask(capsys, run, picture(kind))
    assert (status, err) == (0, "")
    assert out.endswith("\n")


def test_as_json_it_is_what_the_library_says(capsys, run, picture):
    image = picture("plain")
    status, out, _ = ask(capsys, run, image, "--json", "--budget", "2")
    assert status == 0
    answer = zoo.load(run).generate(image, PROMPT, budget=2, max_new_tokens=4)
    assert json.loads(out) == {
        "model": str(run),
        "images": [str(image)],
        "system": None,
        "prompt": PROMPT,
        "answer": answer,
        "budget": 2,
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty (0 bytes)"),
        (b"no picture at all", "is not a picture"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "picture"),
        (None, "does not exist"),
    ],
)
def test_a_bad_picture_is_refused_by_name(capsys, run, tmp_path, content, message):
    image = tmp_path / "odd.png"
    if content is not None:
        image.write_bytes(content)
    status, out, err = ask(capsys, run, image)
    assert (status, out) == (1, "")
    assert str(image) in err
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "prompt", "expected", "message"),
    [
        (["--budget", "5"], PROMPT, 2, "budget = 5: want 1 to num_queries = 4"),
        (["--budget", "0"], PROMPT, 2, "budget = 0: want 1 to"),
        (["--budget", "many"], PROMPT, 2, "invalid int value: 'many'"),
        (["--max-new-tokens", "0", "--bugdet", "1"], PROMPT, 2, "unrecognized arguments"),
        (["--temperature", "-1"], PROMPT, 2, "temperature is -1.0"),
        (["--top-p", "0.5"], PROMPT, 2, "give a temperature"),
        (["--dtype", "float8"], PROMPT, 2, "invalid choice: 'float8'"),
        (["--stop", ""], PROMPT, 2, "a stop string is empty"),
        (["--stream", "--json"], PROMPT, 2, "--stream and --json"),
        (["--image", "second.png"], PROMPT, 2, "2 pictures"),
        (["--raw"], PROMPT, 2, "no other form of a prompt"),
        ([], " ", 1, "the question is empty"),
        ([], "why? " * 40, 1, "more than the 20 that the model takes"),
    ],
)
def test_bad_requests_are_refused(capsys, run, picture, flags, prompt, expected, message):
    status, out, err = ask(capsys, run, picture("plain"), *flags, prompt=prompt)
    assert (status, out) == (expected, "")
    assert message in err
    assert "Traceback" not in err


def test_streaming_prints_the_same(capsys, run, picture):
    flags = ("--temperature", "2", "--seed", "5")
    _, whole, _ = ask(capsys, run, picture("plain"), *flags)
    status, streamed, err = ask(capsys, run, picture("plain"), *flags, "--stream")
    assert (status, err) == (0, "")
    assert streamed == whole
    assert len(whole) > 1


def test_text_alone(capsys, run):
    assert main(["generate", str(run), "--prompt", PROMPT, "--max-new-tokens", "4"]) == 0
    answer = zoo.load(run).generate(None, PROMPT, max_new_tokens=4)
    assert capsys.readouterr().out == answer + "\n"


def test_an_interrupted_answer_ends_with_130(capsys, run, picture, monkeypatch):
    def interrupted(*_, **__):
        yield "half"
        raise KeyboardInterrupt

    monkeypatch.setattr(Loaded, "stream", interrupted)
    status, out, err = ask(capsys, run, picture("plain"), "--stream")
    assert (status, out, err) == (130, "half", "zoo: interrupted\n")


def test_an_answer_has_at_least_one_token(capsys, run):
    argv = ["generate", str(run), "--image", "x.png", "--prompt", PROMPT]
    assert main([*argv, "--max-new-tokens", "0"]) == 2
    assert "--max-new-tokens is 0" in capsys.readouterr().err


def test_a_folder_without_a_model(capsys, tmp_path, picture):
    status, _, err = ask(capsys, tmp_path, picture("plain"))
    assert status == 1
    assert "holds no model" in err


def test_agents(capsys, run, picture):
    status, _, err = ask(capsys, run, picture("plain"), "--agent", "damro_tiny")
    assert status == 2 and "want a connector with a token for every patch" in err
    status, _, err = ask(capsys, run, picture("plain"), "--agent", "mqt_tiny")
    assert status == 2 and "no agent" in err
    status, _, err = ask(capsys, run, picture("plain"), "--agent", "damro", "--stream")
    assert status == 2 and "leave --stream, --raw and --system out" in err
