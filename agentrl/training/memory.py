"""How much memory engines and trainer will take, from the configuration and the model's own config: no weight is loaded.

Estimates, good enough to tell what fits from what does not. All numbers are bytes unless a name says otherwise.
"""

from __future__ import annotations

import resource
from dataclasses import dataclass

from agentrl.config import Config, ConfigError
from agentrl.training.sizes import Sizes

_GIB = 2**30

# Multiplies the estimate of activations. Above 1 where a measured peak is above it.
_ACTIVATIONS = 1.0

# What CUDA and its libraries hold for a process beside its tensors.
_CUDA_CONTEXT = _GIB // 2

# What Python and its libraries hold for a trainer's process, on a CPU in the same memory as its tensors.
_LIBRARIES = 9 * _GIB // 10

# What an engine that sleeps still holds beside that: its graphs and what was no part of weights and cache.
_ASLEEP = _GIB

# Memory for the activations of a pack, where the configuration does not bound its tokens. On a CPU it is what fits beside an
# engine on a laptop; on a GPU a share of what is free, since moments, gradients and logits come later.
_CPU_ROOM = 13 * _GIB // 8
_GPU_SHARE = 0.6

# Beyond it a pack gains nothing: a CPU's caches are small, and a GPU is busy.
_MOST_TOKENS = {"cpu": 2048, "cuda": 32768}
_LEAST_TOKENS = 256

# The logits that the trainer holds at once, in numbers, see `agentrl.training.scoring.head`.
_LOGITS = {"cpu": 1 << 23, "cuda": 1 << 27}

# Versions of the adapter that an engine has room for, see `agentrl.engines.vllm`.
_ENGINE_ADAPTERS = 2

# A weight in NF4, in bytes: 4 bits, a scale of 8 bits for 64 weights, and one of 32 bits for 256 of these scales.
_NF4 = 1 / 2 + 1 / 64 + 4 / (64 * 256)

# What an optimizer keeps of a trained weight beside the weight and its gradient, in bytes.
_STATE_OF_A_WEIGHT = {"adamw": 8, "adamw_8bit": 2, "muon": 4}

# A pickled token of an episode: its id, log-probability and text.
_PICKLED_TOKEN = 32


def activation_bytes(sizes: Sizes, tokens: int, dtype: str, *, checkpointing: bool) -> int:
    """Return what autograd keeps of a pack of `tokens` tokens between the forward and the backward pass.

    Of a layer with hidden size H, intermediate size I, Q = heads x width and K = key heads x width, one token leaves

        2 H         the inputs of both norms, in fp32 in any case
        2 Q + 2 K   queries, keys, values, and what attention makes of them
        3 I         both halves of the MLP, and the activated one

    and what the adapted layers read of it: in fp32, where the adapter is merged into the weights, 2 H + I, which layers
    share; in bf16 a copy for each adapted layer, and what the first of its two factors gives to the second. Layers with DoRA
    also keep twice what they give. Where all weights are trained, layers read 2 H + I in fp32 and 5 H + I in bf16, and both
    norms keep what they multiply with their weights, 2 H in fp32. One more layer stands for the gradients on their way back.
    With `checkpointing` a layer keeps its input alone, and is computed again
    when its gradient is.
    """
    width = 4 if dtype == "float32" else 2
    if dtype == "float32" or sizes.whole:
        read = (2 if dtype == "float32" else 5) * sizes.hidden + sizes.intermediate
    else:
        read = sizes.adapted_inputs // sizes.layers
    read += 2 * sizes.dora_outputs // sizes.layers
    norms = 4 * (4 if sizes.whole else 2) * sizes.hidden
    layer = norms + width * (2 * sizes.queries + 2 * sizes.keys + 3 * sizes.intermediate + read)
    kept = sizes.layers * width * sizes.hidden + 2 * layer if checkpointing else (sizes.layers + 1) * layer
    return int(_ACTIVATIONS * tokens * kept)


def tokens_that_fit(sizes: Sizes, room: int, dtype: str, *, checkpointing: bool) -> int:
    """Return how many tokens a pack may have so that its activations fit into `room` bytes; the inverse of `activation_bytes`."""
    return max(0, room) // activation_bytes(sizes, 1, dtype, checkpointing=checkpointing)


@dataclass(frozen=True, slots=True)
class TrainerMemory:
    """What the trainer's process holds.

    Attributes:
        weights: of the model, and in fp32 a second time those that the adapter is merged into. Where all weights are trained:
            in fp32, in bf16 a second time in that, and with a KL term once more as they were at the start.
        trained: gradients of what is trained and the optimizer's moments, in fp32; also the weights of an adapter, and with a
            KL term those that it began with.
        activations: see `activation_bytes`.
        logits: [scored tokens, vocabulary] in fp32, their exponentials, and both in the model's precision; of a pack a chunk
            at a time, with `packing: none` of a whole episode. Where all weights are trained also the output layer's gradient,
            and in bf16 this and the layer itself once more in that.
        context: of CUDA, or of libraries on a CPU.
    """

    weights: int
    trained: int
    activations: int
    logits: int
    context: int

    @property
    def resident(self) -> int:
        """What stays between steps."""
        return self.weights + self.trained + self.context

    @property
    def peak(self) -> int:
        """The most that a step takes."""
        return self.resident + self.activations + self.logits


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """What one engine holds on each of its cards.

    Attributes:
        weights: of the model, and room for the versions of an adapter that engines load.
        token: keys and values of one token, 2 x layers x key heads x width numbers.
        budget: what the engine may take in all; None where the card is not known.
        cache: of `budget` the part for keys and values; on a CPU `engine.kv_cache_gib`.
    """

    weights: int
    token: int
    budget: int | None
    cache: int | None


def trainer_memory(config: Config, sizes: Sizes, tokens: int) -> TrainerMemory:
    """Return what the trainer takes where it holds the activations of `tokens` tokens at once."""
    training, dtype = config.training, config.model.dtype
    width = 4 if dtype == "float32" else 2
    reference = int(training.kl.coefficient > 0)
    processes = training.workers if training.shard else 1
    if training.shard:
        # Of these, at most the outermost and two layers are whole at a time.
        outermost = sizes.vocabulary * sizes.hidden
        together = outermost + 2 * (sizes.weights - outermost) // sizes.layers
        weights = (4 + width * reference) * sizes.weights // processes + (4 + _computed_width(dtype)) * together
    elif sizes.whole:
        weights = (4 + _computed_width(dtype) + width * reference) * sizes.weights
    else:
        # With DoRA nothing is merged.
        merged = sizes.adapted_weights if dtype == "float32" and not sizes.dora_outputs else 0
        weights = _model_bytes(config, sizes) + width * merged
    kept = optimizer_bytes(config, sizes) + 4 * (1 if sizes.whole else 2 + reference) * sizes.trained
    return TrainerMemory(
        weights=weights,
        trained=kept // processes,
        activations=activation_bytes(sizes, tokens, dtype, checkpointing=training.gradient_checkpointing),
        logits=_logits_bytes(config, sizes, tokens * sizes.vocabulary),
        context=_CUDA_CONTEXT if config.device == "cuda" else _LIBRARIES,
    )


def _model_bytes(config: Config, sizes: Sizes) -> int:
    """Return what the weights of the model take, without its adapter."""
    width = 4 if config.model.dtype == "float32" else 2
    if config.model.quantization is None:
        return width * sizes.weights
    return width * (sizes.weights - sizes.linear_weights) + int(_NF4 * sizes.linear_weights)


def optimizer_bytes(config: Config, sizes: Sizes) -> int:
    """Return what the optimizer keeps of all trained weights. Embeddings have two moments in fp32 under every optimizer."""
    embeddings = sizes.vocabulary * sizes.hidden if sizes.whole else 0
    return _STATE_OF_A_WEIGHT[config.training.optimizer.name] * (sizes.trained - embeddings) + 8 * embeddings


def checkpoint_bytes(config: Config, sizes: Sizes) -> int:
    """Return what a checkpoint takes of the disk: the trained weights in fp32, and what the optimizer keeps of them."""
    return 4 * sizes.trained + optimizer_bytes(config, sizes)


def _computed_width(dtype: str) -> int:
    """Return the bytes that a trained weight takes a second time while the model computes."""
    return 0 if dtype == "float32" else 2


def later_bytes(config: Config, sizes: Sizes) -> int:
    """Return what the trainer takes of its card after it has loaded a model all of whose weights are trained."""
    processes = config.training.workers if config.training.shard else 1
    kept = (4 + _computed_width(config.model.dtype)) * sizes.weights + optimizer_bytes(config, sizes)
    return kept // processes if sizes.whole else 0


def _logits_bytes(config: Config, sizes: Sizes, numbers: int) -> int:
    """Return what the logits of a pass take that has so many of them."""
    width = 4 if config.model.dtype == "float32" else 2
    head = sizes.vocabulary * sizes.hidden * (4 + 2 * _computed_width(config.model.dtype)) if sizes.whole else 0
    if config.training.packing == "none":
        scored = min(config.agent.max_episode_tokens, (config.agent.max_turns + 1) * config.agent.max_turn_tokens)
        return head + scored * sizes.vocabulary * (8 + 2 * width)
    return head + min(_LOGITS[config.device], numbers) * (8 + 2 * width)


def whole_while_loading(config: Config, sizes: Sizes) -> int:
    """Return what a trainer process holds of a model before `training.shard` deals it out; 0 where nothing is dealt out."""
    if not config.training.shard:
        return 0
    width = 4 if config.model.dtype == "float32" else 2
    reference = width if config.training.kl.coefficient else 0
    return (4 + reference) * sizes.weights + _CUDA_CONTEXT


def engine_memory(config: Config, sizes: Sizes, card: int | None) -> EngineMemory:
    """Return what an engine takes of each of its cards, which have `card` bytes; None where that is not known."""
    engine, width = config.engine, 4 if config.model.dtype == "float32" else 2
    adapters = _ENGINE_ADAPTERS * sizes.adapter if config.model.publishes_adapter else 0
    weights = (_model_bytes(config, sizes) + width * adapters) // engine.cards
    token = 2 * sizes.layers * sizes.keys * width // engine.cards
    if config.device == "cpu":
        cache = engine.kv_cache_gib * _GIB
        return EngineMemory(weights, token, weights + cache, cache)
    if card is None:
        return EngineMemory(weights, token, None, None)
    budget = int(engine.memory_utilization * card)
    return EngineMemory(weights, token, budget, budget - weights)


def card_bytes(config: Config) -> int | None:
    """Return the memory of a card that engines and trainer will run on, None where that is not known or there is none.

    The cards of a machine are taken to be alike; those of another machine are not known.
    """
    if config.device == "cpu" or config.ray.address is not None:
        return None
    import torch

    return torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else None


def pack_tokens(config: Config, sizes: Sizes, free: int) -> int:
    """Return the tokens of a pack: those that the configuration says, or as many as fit.

    Args:
        free: bytes that nobody has taken of the card with the trainer's model; on a CPU it plays no part.
    """
    training, kind = config.training, config.device
    room = _CPU_ROOM if kind == "cpu" else int(_GPU_SHARE * (free - _logits_bytes(config, sizes, _LOGITS[kind])))
    fits = tokens_that_fit(sizes, room, config.model.dtype, checkpointing=training.gradient_checkpointing)
    return training.tokens_per_micro_batch or max(_LEAST_TOKENS, min(fits, _MOST_TOKENS[kind]))


def least_tokens(config: Config) -> int:
    """Return the tokens whose activations the trainer must be able to hold: a pack's, and those of the longest episode.

    An episode that is longer than a pack has a pass of its own, and with `packing: none` each has.
    """
    bound = config.training.tokens_per_micro_batch or 0
    return max(config.agent.max_episode_tokens, 0 if config.training.packing == "none" else bound)


def tokens_held(config: Config, sizes: Sizes, card: int | None) -> int:
    """Return the tokens whose activations the trainer will hold; where the card is not known, the least that it may be."""
    least = least_tokens(config)
    if config.training.packing == "none" or (config.device == "cuda" and card is None):
        return least
    free = 0
    if card is not None:
        engines = config.rollout.workers * config.engine.memory_utilization if config.engine.shares_card else 0
        free = int((1 - engines) * card) - trainer_memory(config, sizes, 0).resident
    return max(least, pack_tokens(config, sizes, free))


def trainer_room(config: Config, card: int) -> int:
    """Return what the trainer may take of its card while it trains: all, or what the engines on the same card leave."""
    if not config.engine.shares_card:
        return card
    if config.engine.sleep:
        return card - config.rollout.workers * (_CUDA_CONTEXT + _ASLEEP)
    return card - int(config.rollout.workers * config.engine.memory_utilization * card)


def check_memory(config: Config, sizes: Sizes, card: int) -> None:
    """Check that an engine fits into its part of a card and the trainer into its own.

    Args:
        card: the memory of each card.

    Raises:
        ConfigError: if one does not, with the settings to change.
    """
    engine, settings = engine_memory(config, sizes, card), config.engine
    need = engine.weights + engine.token * config.agent.max_episode_tokens
    if config.engine.kind == "vllm" and need > engine.budget:
        raise ConfigError(
            f"an engine needs {size(need)} for {config.model.path} and the keys and values of one episode of "
            f"agent.max_episode_tokens {config.agent.max_episode_tokens}, and engine.gpu_memory_utilization "
            f"{settings.memory_utilization:.2g} of a card of {size(card)} is {size(engine.budget)}; raise it, raise engine.gpus, "
            "or take a smaller model"
        )
    tokens = least_tokens(config)
    trainer, room = trainer_memory(config, sizes, tokens), trainer_room(config, card)
    if trainer.peak > room:
        raise ConfigError(
            f"the trainer needs about {size(trainer.peak)} for {tokens:,} tokens at once and has "
            f"{size(room)} of a card of {size(card)}; {_ways_out(config, sizes, card)}"
        )
    whole = whole_while_loading(config, sizes)
    if whole > room:
        raise ConfigError(
            f"each trainer process needs {size(whole)} while it loads the model, before training.shard deals it out, and has "
            f"{size(room)} of a card of {size(card)}; take larger cards, or train an adapter with model.lora"
        )
    most = most_utilization(config, sizes, card)
    if settings.shares_card and settings.memory_utilization > most:
        raise ConfigError(
            f"beside engines that are awake the trainer keeps {size(trainer.resident)} of a card of {size(card)}; set "
            f"engine.gpu_memory_utilization to at most {most:.2f}"
        )


def _ways_out(config: Config, sizes: Sizes, card: int) -> str:
    """Say which settings let a trainer fit that does not."""
    ways = []
    most = most_utilization(config, sizes, card)
    if config.engine.shares_card and not config.engine.sleep:
        if most > 0:
            ways.append(f"set engine.gpu_memory_utilization to at most {most:.2f}")
        ways.append("set engine.sleep to true with rollout.max_staleness 0")
    if not config.training.gradient_checkpointing:
        ways.append("set training.gradient_checkpointing to true")
    if sizes.whole:
        ways.append("train an adapter with model.lora")
    fewer = least_tokens(config) > config.agent.max_episode_tokens
    ways.append("lower training.tokens_per_micro_batch" if fewer else "lower agent.max_episode_tokens")
    return ", or ".join(ways)


def most_utilization(config: Config, sizes: Sizes, card: int) -> float:
    """Return the greatest `engine.gpu_memory_utilization` that leaves a trainer on the same card its room; may be below 0."""
    trainer = trainer_memory(config, sizes, least_tokens(config))
    kept = trainer.resident if config.engine.sleep else trainer.peak
    return (card - kept) / card / config.rollout.workers


def store_bytes(config: Config, sizes: Sizes) -> int:
    """Return the size of the object store that a run needs on each machine.

    Two versions of what engines load, of which the next is put while engines read the last, and the episodes of the steps that
    are under way; all of it twice, because the store needs gaps. At least 1 GiB, at which Ray stores nothing on the disk.
    """
    rollout = config.rollout
    published = (4 if config.model.dtype == "float32" else 2) * (
        sizes.adapter if config.model.publishes_adapter else sizes.weights
    )
    episodes = (1 + rollout.max_staleness) * rollout.group_size * rollout.questions_per_step
    return max(_GIB, 2 * (2 * published + episodes * config.agent.max_episode_tokens * _PICKLED_TOKEN))


def peak_bytes(device: str) -> int:
    """Return the most memory that this process has held: of its card what torch had reserved there, on a CPU all of it."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_reserved()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def size(count: int) -> str:
    """Write a number of bytes for people."""
    return f"{count / _GIB:.1f} GiB" if count >= _GIB else f"{count / 2**20:.0f} MiB"
