import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_it_begins_with_the_default_run_and_the_tests():
    [block, *_] = re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    train, test = block.splitlines()
    assert train == "pip install -e '.[train,captions]' -c constraints.txt && python run_train.py"
    assert test == "pip install -e '.[test]' -c constraints.txt && pytest"
    assert test.replace("pip install", "pip install -q") in (ROOT / ".ci" / "run").read_text().splitlines()
