"""docs/configuration.md: made from the tree of settings, each key once with its default, and examples that work."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from docs.make_configuration import page
from pipeline.config.tree import Config, EncoderSettings
from pipeline.models.encoder import load_encoder

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "configuration.md").read_text()


def settings(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The full name of every setting, and its default as the page writes it."""
    for name, field in model.model_fields.items():
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        sections = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if sections:
            yield from settings(sections[0], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", "required" if field.is_required() else written(field.default)


def keys(values: dict[str, object], prefix: str = "") -> Iterator[str]:
    """The full names of the keys of a config."""
    for name, value in values.items():
        yield f"{prefix}{name}"
        yield from keys(value, f"{prefix}{name}.") if isinstance(value, dict) else ()


def written(default: object) -> str:
    if default is None:
        return "none"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"  # as YAML has it
    return f"`{list(default) if isinstance(default, tuple) else default}`"


def documented() -> list[tuple[str, str]]:
    """The keys of the page's tables under the sections that its headings name, and their defaults."""
    found = []
    for part in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]:
        heading, _, body = part.partition("\n")
        sections = re.findall(r"`([\w.]+)`", heading) or [""]
        for key, kind, default, meaning in re.findall(r"^\| `(\w+)` \| (.+?) \| (.+?) \| (.+) \|$", body, re.MULTILINE):
            assert kind.strip(), key
            assert meaning.strip(), key
            found += [(f"{section}.{key}".lstrip("."), default) for section in sections]
    return found


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def test_the_page_is_the_one_that_make_docs_writes() -> None:
    assert page() == PAGE, "run `make docs`"


def test_the_first_example_is_a_valid_config_of_twelve_keys() -> None:
    example = yaml.safe_load(blocks("yaml")[0])
    Config.model_validate(example)
    del example["encoders"]["new"]["preprocess"]
    assert len({*keys(example)} & {name for name, _ in settings(Config)}) + 1 == 12  # with preprocess


def test_the_page_has_every_setting_once_with_its_default_and_nothing_else() -> None:
    pairs = documented()
    assert len(pairs) == len(dict(pairs)), "a key is there twice"
    assert dict(pairs) == dict(settings(Config))


def test_the_example_of_an_export_is_an_encoder_for_any_batch_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    (example,), (*_, config) = blocks("python"), blocks("yaml")
    exec(compile(example, "configuration.md", "exec"), {})
    encoder = EncoderSettings.model_validate(yaml.safe_load(config)["encoders"]["new"])
    model = load_encoder(encoder, torch.device("cpu"))
    with torch.inference_mode():
        assert model(torch.zeros((3, 3, 224, 224), dtype=torch.uint8)).shape == (3, 512)
