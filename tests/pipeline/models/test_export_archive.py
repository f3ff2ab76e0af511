"""torch.export archives with code in them: what torch would run is refused before torch reads it."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.config.tree import EncoderSettings
from pipeline.errors import DataError
from pipeline.models.encoder import load_encoder
from pipeline.models.export_archive import check
from tests.conftest import SHARED_DATA

CIFAR100 = SHARED_DATA / "cifar100"

SIDE, DIM = 4, 3
Model = dict[str, Any]  # the JSON of an exported model


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(SIDE * SIDE, DIM)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.last(pixels.flatten(1))
        return found


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("archives") / "encoder.pt2"
    shapes = ({0: torch.export.Dim("batch", min=1, max=1024)},)
    torch.export.save(torch.export.export(Network(), (torch.zeros(2, 1, SIDE, SIDE),), dynamic_shapes=shapes), path)
    return path


def changed(archive: Path, path: Path, change: Callable[[Model], Model]) -> Path:
    """A copy of an archive with another model."""
    with zipfile.ZipFile(archive) as good, zipfile.ZipFile(path, "w") as bad:
        for name in good.namelist():
            data = good.read(name)
            if name.endswith("models/model.json"):
                data = json.dumps(change(json.loads(data))).encode()
            bad.writestr(name, data)
    return path


def touch(path: Path) -> str:
    """Python that makes a file."""
    return f"__import__('pathlib').Path({str(path)!r}).touch()"


def with_guard(model: Model, code: str) -> Model:
    return model | {"guards_code": [f"({code}, True)[1]"]}


def with_shape(model: Model, code: str) -> Model:
    text = json.dumps(model)
    shape = next(
        size["as_expr"]["expr_str"]
        for value in model["graph_module"]["graph"]["tensor_values"].values()
        for size in value["sizes"]
        if "as_expr" in size
    )
    found: Model = json.loads(text.replace(json.dumps(shape), json.dumps(f"({code}, {shape})[1]")))
    return found


CODE = {"guards": with_guard, "expr_str": with_shape}


@pytest.mark.parametrize("where", CODE)
def test_load_encoder_of_an_archive_with_code_is_refused_and_the_code_does_not_run(
    tmp_path: Path, archive: Path, where: str
) -> None:
    touched = tmp_path / "touched"
    bad = changed(archive, tmp_path / "bad.pt2", lambda model: CODE[where](model, touch(touched)))
    spec = EncoderSettings.model_validate({"export": str(bad), "dim": DIM, "preprocess": {"size": SIDE, "channels": 1}})
    with pytest.raises(DataError, match=where):
        load_encoder(spec, torch.device("cpu"))
    assert not touched.exists()
    module = torch.export.load(bad).module()  # torch itself runs it: the archive is what it claims to be
    module(torch.zeros(2, 1, SIDE, SIDE))
    assert touched.exists()


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').getcwd()",
        "Symbol('s0').func.__init__.__globals__",
        "(lambda: 1)()",
        "[x for x in (1, 2)]",
        "Symbol('s0', integer=print('x'))",
        "Symbol(\"print('x')\")",
        "eval('1')",
        "s0 + exec('1')",
        "s0 if s1 else s2",
        "f'{s0}'",
        "(",
        "",
    ],
)
def test_check_of_a_shape_that_is_more_than_arithmetic_is_refused(tmp_path: Path, archive: Path, text: str) -> None:
    def change(model: Model) -> Model:
        sizes = next(iter(model["graph_module"]["graph"]["tensor_values"].values()))["sizes"]
        sizes[0] = {"as_expr": {"expr_str": text, "hint": None}}
        return model

    with pytest.raises(ValueError, match="expr_str could execute code"):
        check(changed(archive, tmp_path / "bad.pt2", change))


@pytest.mark.parametrize(
    "text",
    [
        "Symbol('s77', positive=True, integer=True)",
        "Add(Mul(Integer(2), Symbol('s0', integer=True)), Integer(-1))",
        "FloorDiv(Symbol('s0', integer=True), Integer(2))",
        "s0 + 3*s1 // 2",
        "Max(1, s0)",
    ],
)
def test_check_of_a_shape_of_symbols_and_arithmetic_passes(tmp_path: Path, archive: Path, text: str) -> None:
    def change(model: Model) -> Model:
        sizes = next(iter(model["graph_module"]["graph"]["tensor_values"].values()))["sizes"]
        sizes[0] = {"as_expr": {"expr_str": text, "hint": None}}
        return model

    check(changed(archive, tmp_path / "good.pt2", change))


@pytest.mark.parametrize(
    ("kind", "context"),
    [
        (
            "collections.defaultdict",
            '{"default_factory_module": "os", "default_factory_name": "x", "dict_context": []}',
        ),
        ("builtins.dict", '[{"__enum__": true, "fqn": "os:x", "name": "x"}]'),
        ("builtins.dict", "[\"a=print('x')\"]"),
    ],
)
def test_check_of_a_call_signature_that_imports_or_names_more_than_words_is_refused(
    tmp_path: Path, archive: Path, kind: str, context: str
) -> None:
    def change(model: Model) -> Model:
        spec = json.dumps([1, {"type": kind, "context": context, "children_spec": []}])
        model["graph_module"]["module_call_graph"][0]["signature"]["in_spec"] = spec
        return model

    with pytest.raises(ValueError, match="in_spec could execute code"):
        check(changed(archive, tmp_path / "bad.pt2", change))


def test_check_of_an_input_whose_name_is_more_than_a_word_is_refused(tmp_path: Path, archive: Path) -> None:
    """torch writes the names of inputs into the source of `forward`."""

    def change(model: Model) -> Model:
        found: Model = json.loads(json.dumps(model).replace('"pixels"', '"pixels=print()"'))
        return found

    with pytest.raises(ValueError, match="could execute code: 'pixels=print"):
        check(changed(archive, tmp_path / "bad.pt2", change))


@pytest.mark.skipif(not (CIFAR100 / "new.pt2").exists(), reason="the real encoders are not here")
@pytest.mark.parametrize("name", ["old.pt2", "new.pt2"])
def test_check_of_the_shared_encoders_passes(name: str) -> None:
    check(CIFAR100 / name)


def test_check_of_a_real_architecture_as_torch_exports_it_passes(tmp_path: Path) -> None:
    from torchvision.models import vit_b_32

    shapes = ({0: torch.export.Dim("batch", min=1, max=1024)},)
    model = vit_b_32(image_size=64, weights=None).eval()
    program = torch.export.export(model, (torch.zeros(2, 3, 64, 64),), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "vit.pt2")
    check(tmp_path / "vit.pt2")
