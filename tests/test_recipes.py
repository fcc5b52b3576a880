from pathlib import Path

import pytest

from jaxmm.recipes import find_recipe, load_recipe, recipe_folder
from jaxmm.validation import ConfigError

CONFIGS = Path(__file__).parents[1] / "configs"


def test_by_name_or_path(tmp_path, monkeypatch):
    assert recipe_folder() == CONFIGS
    monkeypatch.chdir(tmp_path)
    for name in ("clip_scenes", "clip_scenes.py", "configs/clip_scenes.py", CONFIGS / "clip_scenes.py"):
        assert find_recipe(name) == CONFIGS / "clip_scenes.py"
    (tmp_path / "clip_scenes.py").write_text("def get_config():\n    return 7\n")
    assert load_recipe("clip_scenes.py") == 7      # a file here comes first
    assert load_recipe("clip_scenes").steps > 7


def test_an_installed_wheel_has_them_inside(tmp_path, monkeypatch):
    (tmp_path / "jaxmm" / "configs").mkdir(parents=True)
    (tmp_path / "jaxmm" / "configs" / "own.py").write_text("def get_config():\n    return 3\n")
    monkeypatch.setattr("jaxmm.recipes.__file__", str(tmp_path / "jaxmm" / "recipes.py"))
    assert load_recipe("own") == 3


@pytest.mark.parametrize("name, words", [
    ("clip_scene", "did you mean 'clip_scenes'? Recipes: attention_conv_cifar10.py, "),
    ("other/clip_scenes.py", "'other/clip_scenes.py', which is no file and no recipe; did you mean 'clip_scenes'?"),
    ("qqqq", "no recipe. Recipes: ")])
def test_an_unknown_one(name, words):
    with pytest.raises(ConfigError) as raised:
        find_recipe(name)
    assert words in str(raised.value) and "vit_digits.py" in str(raised.value)
