"""Turns texts into vectors with a sentence encoder that transformers loads."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrievers.base import RetrieverError
from retrievers.models import in_length_order, load_model, load_tokenizer, model_folder, pick_device, weights_sha256

POOLINGS = ("mean", "cls")


@dataclass(frozen=True, slots=True)
class EncoderOptions:
    """Which model encodes, and how.

    Attributes:
        path: see `retrievers.models.model_folder`.
        pooling: "mean" of the tokens' vectors or that of the first token, "cls"; None takes what the folder's
            sentence-transformers files (`1_Pooling/config.json`) say.
        normalize: scale vectors to length 1, which makes the inner product a cosine; None normalises if the folder's
            `modules.json` does, or if the folder has no such file.
        query_prefix: put before each query. E5 wants "query: ", BGE v1.5 (English)
            "Represent this sentence for searching relevant passages: ".
        passage_prefix: put before each passage. E5 wants "passage: ".
        max_tokens: what follows in a longer text is not encoded; None takes what `sentence_bert_config.json` says, or
            the tokenizer's limit.
    """

    path: str
    pooling: str | None = None
    normalize: bool | None = None
    query_prefix: str = ""
    passage_prefix: str = ""
    max_tokens: int | None = None


class Encoder:
    """A loaded model. Use it on one thread at a time.

    Attributes:
        options: with nothing left open.
        dimension: length of a vector.
        sha256: of the weights and the tokenizer.
        device: where it computes, such as "cpu" or "cuda".
        dtype: what it computes in; vectors are pooled, and come, in float32.
    """

    def __init__(self, options: EncoderOptions, *, device: str | None = None, dtype: str = "float32") -> None:
        """Load the model onto a device, by default a GPU where torch sees one, in one of `retrievers.models.DTYPES`.

        Raises:
            RetrieverError: if the model or the device is not there, or an option does not fit the model.
        """
        folder = model_folder(options.path)
        self._tokenizer: Any = load_tokenizer(folder)
        self.device = pick_device(device)
        self.dtype = dtype
        self._model: Any = load_model("AutoModel", folder, device=self.device, may_lack="pooler.", dtype=dtype)
        self._torch: Any = importlib.import_module("torch")
        self.dimension = int(self._model.config.hidden_size)
        self.sha256 = weights_sha256(folder)
        self.options = _settled(options, folder, self._longest())

    def description(self) -> dict[str, object]:
        """All that decides a text's vector, for a manifest."""
        return {
            **asdict(self.options),
            "weights_sha256": self.sha256,
            "dimension": self.dimension,
            "dtype": self.dtype,
        }

    def encode_queries(self, queries: Sequence[str], batch: int = 32) -> NDArray[np.float32]:
        """The queries' vectors, float32 of shape (queries, dimension)."""
        return self._encode([self.options.query_prefix + query for query in queries], batch)

    def encode_passages(self, passages: Sequence[str], batch: int = 32) -> NDArray[np.float32]:
        """The passages' vectors, float32 of shape (passages, dimension)."""
        return self._encode([self.options.passage_prefix + passage for passage in passages], batch)

    def _encode(self, texts: list[str], batch: int) -> NDArray[np.float32]:
        if not texts:
            return np.empty((0, self.dimension), np.float32)
        tokens = self._tokenizer(texts, truncation=True, max_length=self.options.max_tokens)["input_ids"]
        vectors = in_length_order(
            [len(ids) for ids in tokens], batch, lambda positions: list(self._pool([tokens[p] for p in positions]))
        )
        return np.stack(vectors)

    def _pool(self, tokens: list[list[int]]) -> NDArray[np.float32]:
        """The vectors of one batch, float32 of shape (texts, dimension)."""
        torch = self._torch
        inputs = self._tokenizer.pad({"input_ids": tokens}, return_tensors="pt").to(self.device)
        with torch.inference_mode():
            states_B_T_D = self._model(**inputs).last_hidden_state.float()
            if self.options.pooling == "cls":
                pooled_B_D = states_B_T_D[:, 0]
            else:
                mask_B_T_1 = inputs["attention_mask"].unsqueeze(-1).to(states_B_T_D.dtype)
                pooled_B_D = (states_B_T_D * mask_B_T_1).sum(1) / mask_B_T_1.sum(1)
            if self.options.normalize:
                pooled_B_D = torch.nn.functional.normalize(pooled_B_D, dim=-1)
            return pooled_B_D.cpu().numpy()

    def _longest(self) -> int:
        """How many tokens the model can take; tokenizers without a limit claim an absurd one."""
        positions = getattr(self._model.config, "max_position_embeddings", None) or 512
        # RoBERTa's positions begin behind the padding's.
        if self._model.config.model_type in ("roberta", "xlm-roberta"):
            positions -= self._model.config.pad_token_id + 1
        return int(min(self._tokenizer.model_max_length, positions))


def _settled(options: EncoderOptions, folder: Path, longest: int) -> EncoderOptions:
    """Fill in what the options leave open, from the folder's sentence-transformers files."""
    where = f"encoder {options.path}"
    pooling = options.pooling or _pooling(folder, where)
    if pooling not in POOLINGS:
        raise RetrieverError(f"{where}: pooling is {pooling!r} and must be one of {', '.join(POOLINGS)}")
    normalize = options.normalize
    if normalize is None:
        modules = _read(folder / "modules.json")
        normalize = modules is None or any(str(module.get("type", "")).endswith(".Normalize") for module in modules)
    limit = options.max_tokens
    if limit is None:
        limit = min((_read(folder / "sentence_bert_config.json") or {}).get("max_seq_length") or longest, longest)
    if not 1 < limit <= longest:
        raise RetrieverError(f"{where}: max_tokens is {limit} and must be between 2 and the model's {longest}")
    return EncoderOptions(
        options.path, pooling, normalize, options.query_prefix, options.passage_prefix, max_tokens=limit
    )


def _pooling(folder: Path, where: str) -> str:
    settings = _read(folder / "1_Pooling" / "config.json")
    if settings is None:
        raise RetrieverError(f"{where}: {folder} has no 1_Pooling/config.json; say pooling mean or cls")
    chosen = [name for name, value in settings.items() if name.startswith("pooling_mode_") and value is True]
    names = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    if len(chosen) != 1 or chosen[0] not in names:
        raise RetrieverError(f"{where}: its pooling is {chosen}; only mean and cls are known")
    return names[chosen[0]]


def _read(path: Path) -> Any:
    """The JSON in a file, or None if there is no such file. Raises RetrieverError if it is damaged."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RetrieverError(f"{path} is damaged ({error}); download the model again") from error
