"""The built-in models' records: everything that they name is there."""

from __future__ import annotations

import subprocess
import sys

from erase_concept.pipelines.builtin import builtin_models, catalogs_of
from erase_concept.pipelines.load import configs, load


def test_what_a_record_names_is_there() -> None:
    models = builtin_models()
    assert "emojinette" in models
    for name, model in models.items():
        assert model.name == name
        assert (model.folder / "model_index.json").is_file()
        assert configs(name).components.keys() >= {"unet", "vae", "scheduler"}
        assert model.catalogs
        assert "\n" not in model.about


def test_a_built_in_model_loads_by_name_and_by_its_folder_alike() -> None:
    by_name, by_folder = load("emojinette"), load(builtin_models()["emojinette"].folder)
    assert by_name.describe()["unet"] == by_folder.describe()["unet"]


def test_concepts_are_looked_up_in_the_models_own_catalogues() -> None:
    assert catalogs_of("emojinette") == ("emojinette", "unsafe")
    assert catalogs_of("owner/some-model") == ("imagenette", "unsafe", "styles")


def test_records_are_read_without_torch() -> None:
    code = "import sys; from erase_concept.pipelines import builtin; builtin.builtin_models(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "torch" not in done.stdout.split()
