"""Find the files of a checkpoint: a folder, a file, or a repository of the Hugging Face hub.

Only configurations, vocabularies and one form of the weights are downloaded, preferably safetensors. Cache, tokens,
revisions and offline mode are those of `huggingface_hub`.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxmm.pretrained.io.files import FileError, is_pointer

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "open_clip_model.safetensors", "pytorch_model.bin",
           "pytorch_model.bin.index.json", "open_clip_pytorch_model.bin")
"""Names of weights in a folder, in order of preference."""
ENDINGS = (".safetensors", ".npz", ".bin", ".pt", ".pth", ".pth.tar", ".ckpt")
"""Endings of other names of weights; a folder may hold one such file."""
TEXTS = ("*.json", "*.txt", "*.model")
REPOSITORY = re.compile(r"(hf-hub:)?[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Files:
    """The files of a checkpoint: a folder with configurations, and the file with the weights or their index."""

    name: str
    """The source as the user named it."""
    folder: Path
    weights: Path

    def json(self, name: str) -> dict[str, Any] | None:
        """Read the JSON file `name`; None if there is none. Raises `FileError` for anything but an object."""
        path = self.folder / name
        if not path.is_file():
            return None
        try:
            if is_pointer(path):
                raise ValueError("it is a git-lfs pointer; `git lfs pull` fetches the file")
            value = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise FileError(f"{path} cannot be read as JSON: {error}") from None
        if not isinstance(value, dict):
            raise FileError(f"{path} holds a {type(value).__name__}; expected an object")
        return value


def find(source: str | Path, *, revision: str | None = None) -> Files:
    """Find `source`: an existing folder or file, else `NAME/REPOSITORY` on the hub at `revision`.

    Raises `FileError` if there is no such source, or no weights in it.
    """
    path = Path(source)
    if path.is_file():
        return Files(str(source), path.parent, path)
    if path.is_dir():
        return Files(str(source), path, _weights(path, [p.name for p in path.iterdir()], str(source)))
    if not REPOSITORY.fullmatch(str(source)):
        raise FileError(f"{str(source)!r} is no folder, no file, and not the name of a repository, such as "
                        "openai/clip-vit-base-patch32")
    return _download(str(source).removeprefix("hf-hub:"), revision)


def _weights(folder: Path, names: list[str], source: str) -> Path:
    weights = next((name for name in WEIGHTS if name in names), None)
    if weights is None:
        others = sorted(name for name in names if name.endswith(ENDINGS))
        if len(others) != 1:
            raise FileError(f"{source} has {'several' if others else 'no'} files of weights: "
                            f"{', '.join(others) or ', '.join(sorted(names)[:20])}; name the one you want, or the "
                            "folder with it")
        weights = others[0]
    return folder / weights


def _download(repository: str, revision: str | None) -> Files:
    import huggingface_hub
    from huggingface_hub import errors

    def fetch(*patterns):
        return Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))

    try:
        folder = fetch(*TEXTS)
        try:
            names = huggingface_hub.list_repo_files(repository, revision=revision)
        except (errors.OfflineModeIsEnabled, OSError):  # fall back to the cache
            names = [p.relative_to(folder).as_posix() for p in folder.rglob("*")]
        weights = _weights(folder, [name for name in names if "/" not in name], repository)
        wanted = [weights.name]
        if weights.name.endswith(".index.json"):
            wanted += sorted(set(json.loads(weights.read_text())["weight_map"].values()))
        fetch(*wanted)
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileError(f"{repository} cannot be downloaded from the hub: {reason}") from None
    return Files(repository, folder, weights)
