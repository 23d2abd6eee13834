import json
from dataclasses import dataclass, replace

import pytest

from tests.train.tiny import TinyConfig, TinyData, tiny
from zoo.models.connectors.mqt import MQT
from zoo.models.core.codec import decode, diff, encode, show_diff
from zoo.models.core.errors import UsageError, ZooError
from zoo.train.cli import find, names


@dataclass(frozen=True)
class Odd:
    value: object = None


@pytest.mark.parametrize("name", names())
def test_every_configuration_survives_json(name):
    experiment = find(name)
    assert decode(json.loads(json.dumps(encode(experiment)))) == experiment


def test_classes_of_users_are_handed_in():
    text = json.dumps(encode(tiny()))
    assert decode(json.loads(text), (TinyConfig, TinyData)) == tiny()
    with pytest.raises(ZooError, match="TinyConfig"):
        decode(json.loads(text))


@pytest.mark.parametrize(
    "name",
    ["os.system", "zoo.nowhere.C", "zoo.models.core.codec.json", "zoo.train.loop.Path", None, 3],
)
def test_only_dataclasses_of_the_package_are_found_by_name(name):
    with pytest.raises(ZooError, match="configuration class"):
        decode({"class": name})


def test_unknown_and_unfit_fields_are_named():
    tree = encode(MQT())
    with pytest.raises(ZooError, match="num_querys"):
        decode({**tree, "num_querys": 3})
    with pytest.raises(ZooError, match="square number"):
        decode({**tree, "num_queries": 3})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), len, {1: 2}, b""])
def test_what_json_cannot_hold_is_refused(value):
    with pytest.raises(UsageError, match=r"value(\.1)? is"):
        encode(Odd((1, value)) if value is len else Odd(value))


def test_differences_by_dotted_path():
    old = encode(find("digits_vqa_tiny"))
    new = find("digits_vqa_tiny")
    new = replace(new, seed=3, model=replace(new.model, connector=MQT(num_queries=9, num_heads=2)))
    changes = diff(old, encode(new))
    assert changes == {"seed": (0, 3), "model.connector.num_queries": (4, 9)}
    assert show_diff(changes) == "  model.connector.num_queries: 4 → 9\n  seed: 0 → 3"
    assert diff({"a": [{"x": 1}]}, {"a": [{"x": 1}, {"x": 2}]}) == {"a.1.x": ("(absent)", 2)}
