"""The warm start: demonstrations through the real retriever, then a LoRA adapter trained on the model's own tokens."""

from __future__ import annotations

import json
import random
import shutil
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from agentrl.agent.codec import Codec
from agentrl.config import Config, ConfigError
from agentrl.models import load_tokenizer, resolve_model
from agentrl.progress import OnProgress
from agentrl.training.demonstrations import collect_apart
from agentrl.training.own_episodes import choose_episodes
from agentrl.types import Trajectory


@dataclass(frozen=True, slots=True)
class WarmStartResult:
    """What `warm_start` did, as card.json beside the adapter says it.

    Attributes:
        demonstrations: how many the adapter was trained on.
        searches: how many of them have each number of searches.
        tokens: in all demonstrations, prompts included.
        trained_tokens: of these, the model's own.
        final_loss: the mean over the last ten optimizer steps, in nats a token.
        minutes: of the training, without the writing of demonstrations.
    """

    demonstrations: int
    searches: dict[str, int]
    tokens: int
    trained_tokens: int
    final_loss: float
    minutes: float


def warm_start(config: Config, on_progress: OnProgress) -> WarmStartResult:
    """Collect demonstrations, train an adapter on them and save it in the new folder `warmstart.out`, beside card.json.

    The adapter begins as `model.adapter` or fresh, and is saved in fp16.

    Raises:
        ConfigError: if `warmstart.out` exists, or a source yields too few demonstrations.
        DataError: if a question file cannot be read, or no own episode is fit to be trained on.
        RetrieverError: if an index is missing.
    """
    config.require("warmstart")
    out = Path(config.warmstart.out)
    if out.exists():
        raise ConfigError(f"warmstart.out {out}: exists already; remove it or choose another folder")
    demonstrations = _own_episodes(config)
    if config.warmstart.sources:
        demonstrations += collect_apart(config, on_progress)
    # Sources come one after another; training should meet them mixed.
    random.Random(config.seed).shuffle(demonstrations)
    # torch and TRL take seconds to import, and most mistakes are found before they are needed.
    from agentrl.training.sft import SupervisedTraining

    started = time.monotonic()
    training = SupervisedTraining(config, demonstrations, on_progress)
    losses = training.run()
    result = WarmStartResult(
        demonstrations=len(demonstrations),
        searches={str(n): c for n, c in sorted(Counter(len(t.searches) for t in demonstrations).items())},
        tokens=training.tokens,
        trained_tokens=training.trained_tokens,
        final_loss=round(sum(losses[-10:]) / len(losses[-10:]), 4),
        minutes=round((time.monotonic() - started) / 60, 1),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        whole = Path(scratch) / "adapter"
        training.save(whole)
        card = {"config": config.model_dump(mode="json"), "result": asdict(result)}
        (whole / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
        # Under its own name it appears when it is whole.
        shutil.move(whole, out)
    return result


def _own_episodes(config: Config) -> list[Trajectory]:
    if config.warmstart.episodes is None:
        return []
    codec = Codec(load_tokenizer(resolve_model(config.model.path, weights=False)))
    return choose_episodes(config.warmstart.episodes, config.seed, codec)
