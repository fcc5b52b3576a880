"""What `import jaxmm`, `jaxmm.load` and `jaxmm --help` import."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import jaxmm


@pytest.mark.parametrize("code, absent", [
    ("import jaxmm", ("jax", "numpy")),
    ("from jaxmm.cli import main; main(['--help'])", ("jax", "numpy", "tyro")),
    ("import jaxmm; jaxmm.load", (
        "jaxmm.cli", "jaxmm.training", "jaxmm.evals", "tensorflow_datasets", "pyarrow", "grain", "orbax", "optax",
        "ftfy", "scipy", "PIL.ImageOps", "jax.experimental.pallas", "matplotlib", "sklearn", "jinja2",
        "huggingface_hub")),
], ids=["jaxmm", "help", "load"])
def test_nothing_else_is_imported(code, absent):
    code += f"\nimport sys; print([name for name in {absent!r} if name in sys.modules], file=sys.stderr)"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stderr.splitlines()[-1] == "[]"


def test_load_touches_no_device():
    """The number of devices can be set only as long as JAX has not looked for them."""
    code = "import jax, jaxmm; jaxmm.load; jax.config.update('jax_num_cpu_devices', 3); assert jax.device_count() == 3"
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_type_checkers_see_the_public_names():
    tree = ast.parse(Path(jaxmm.__file__).read_text())
    imports = {(node.module, alias.name, alias.asname) for branch in tree.body if isinstance(branch, ast.If)
               for node in branch.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert imports == {(f"jaxmm.{module}", name, name) for name, module in jaxmm._HOME.items()}
    assert (Path(jaxmm.__file__).parent / "py.typed").exists()


@pytest.mark.parametrize("name", jaxmm.__all__)
def test_public_names_exist(name):
    assert getattr(jaxmm, name).__name__ == name


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = jaxmm.lod
