"""What is read of a config, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from compvis_states import tiny_config
from ruamel.yaml import YAML

from quantlab.errors import ModelError
from quantlab.models.compvis.config import ARCHITECTURES, architectures, read_config


def written(tmp_path: Path, content: Any) -> Path:
    file = tmp_path / "config.yaml"
    YAML().dump(content, file)
    return file


@pytest.mark.parametrize("name", architectures())
def test_every_config_that_ships_is_read(name: str) -> None:
    config = read_config(ARCHITECTURES / f"{name}.yaml")
    inner = config.first_stage_config.params.ddconfig
    assert config.image_size * inner.downsampling == (512 if name == "stable-diffusion-v1" else 256)


def test_heads_by_number_and_by_width(tmp_path: Path) -> None:
    by_number = read_config(written(tmp_path, tiny_config("none", num_heads=2))).unet_config.params
    by_width = read_config(written(tmp_path, tiny_config("none", num_head_channels=16))).unet_config.params
    assert [by_number.heads(width) for width in by_number.widths] == [2, 2]
    assert [by_width.heads(width) for width in by_width.widths] == [2, 4], "channels of a head win"


def changed(path: str, value: Any) -> dict[str, Any]:
    content = tiny_config("classes")
    *way, last = path.split(".")
    inner = content
    for key in way:
        inner = inner[key]
    inner[last] = value
    return content


PARAMS = "model.params"
UNET = f"{PARAMS}.unet_config.params"


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("model.target", "os.system", "model.target"),
        (f"{PARAMS}.unet_config.target", "builtins.eval", "unet_config.target"),
        (f"{PARAMS}.first_stage_config.target", "ldm.models.autoencoder.Other", "first_stage_config"),
        (f"{PARAMS}.parameterization", "x0", "parameterization"),
        (f"{PARAMS}.conditioning_key", "concat", "conditioning_key"),
        (f"{PARAMS}.cond_stage_config", "__is_unconditional__", "use_spatial_transformer belong together"),
        (f"{PARAMS}.channels", 4, "as many channels as a latent"),
        (f"{UNET}.dims", 3, "dims"),
        (f"{UNET}.num_classes", 10, "num_classes"),
        (f"{UNET}.resblock_updown", True, "no counterpart in diffusers"),
        (f"{UNET}.num_heads", 3, "do not divide into 3 heads"),
        (f"{UNET}.window", 7, "window"),
    ],
)
def test_what_cannot_be_converted_is_named(tmp_path: Path, path: str, value: Any, says: str) -> None:
    with pytest.raises(ModelError, match="cannot be converted") as error:
        read_config(written(tmp_path, changed(path, value)))
    assert says in error.value.message
    assert "[" not in error.value.where.rpartition("config.yaml")[2]  # type: ignore[union-attr]


def test_no_yaml_and_no_file(tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("model: [")
    for name in ("broken.yaml", "none.yaml"):
        with pytest.raises(ModelError, match="cannot be read"):
            read_config(tmp_path / name)


def test_tags_of_yaml_build_nothing(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("model: !!python/object/apply:os.system ['true']")
    with pytest.raises(ModelError):
        read_config(file)
