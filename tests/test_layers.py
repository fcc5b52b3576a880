import subprocess
import sys
from pathlib import Path


def test_imports_point_down():
    """Check the contracts in pyproject.toml, in a process of its own: import-linter starts others."""
    code = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    root = Path(__file__).parents[1]
    process = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout
