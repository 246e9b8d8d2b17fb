"""The two sides of benchmarks/training.py, and bare matrix products beside them.

Each side makes a `Step`, a function that adds the gradients of one optimizer step on a workload to a policy's. What is
timed is that call alone.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from training_workloads import Workload
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast, Qwen2Config
from trl import GRPOConfig, GRPOTrainer

from agentrl.config import load_config
from agentrl.models import resolve_model
from agentrl.training.batch import Minibatch, batch_tensors
from agentrl.training.memory import pack_tokens
from agentrl.training.sampling import ScoredBatch
from agentrl.training.scoring import Scorer, pack
from agentrl.training.settings import grpo_config
from agentrl.training.sizes import sizes_of
from agentrl.training.trainer import StratifiedTrainer
from agentrl.training.updates import Updates

RANDOM = "random:"
# For policies of random weights.
SIZES: dict[str, tuple[type[PretrainedConfig], dict[str, int]]] = {
    "tiny": (
        LlamaConfig,
        {
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        },
    ),
    "qwen2.5-0.5b": (
        Qwen2Config,
        {
            "vocab_size": 151_936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
        },
    ),
    "qwen2.5-1.5b": (
        Qwen2Config,
        {
            "vocab_size": 151_936,
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
        },
    ),
}
ROWS = 4
# Tokens of each prompt and completion in the step that warms a CPU up.
WARM_UP = 8
CHUNK = 1024
# Of the products' rate: so many passes over all layers, of which the median counts.
PASSES = 3

Step = Callable[[Workload], None]
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Setting:
    """What both sides are given: a model as `model.path` or random:NAME, cpu or cuda, threads of a CPU, and the most tokens
    of agentrl's packs, or None for those that fit."""

    model: str
    device: str
    threads: int
    tokens: int | None


@dataclass(frozen=True, slots=True)
class Measured:
    """One step.

    Attributes:
        seconds: of forward and backward passes.
        processor_seconds: what these took of all processors, which other work on the machine changes less.
        mib, mib_before: the most memory that the process has held, and what it held before the step.
        products: the rate of bare matrix products in FLOP/s, or None where it was not asked for.
        counts: see `counts`.
    """

    seconds: float
    processor_seconds: float
    mib: float
    mib_before: float
    products: float | None
    counts: dict[str, int]


def make_policy(setting: Setting) -> Any:
    """Make the fp32 policy with LoRA adapters of rank 16 on all linear layers, away from the zeros that they start from."""
    torch.manual_seed(0)
    if setting.model.startswith(RANDOM):
        name = setting.model.removeprefix(RANDOM)
        if name not in SIZES:
            raise ValueError(f"--model {setting.model}: no such sizes; choose from {', '.join(SIZES)}")
        kind, sizes = SIZES[name]
        base = AutoModelForCausalLM.from_config(kind(**sizes, tie_word_embeddings=True))
    else:
        base = AutoModelForCausalLM.from_pretrained(resolve_model(setting.model), dtype=torch.float32)
    policy = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    return policy


def make_tokenizer() -> Any:
    """Make the tokenizer that TRL's trainers demand; nothing is encoded with it."""
    core = Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<pad>")


def run_tokens(model: Any, device: str) -> int:
    """Return how many tokens a run on this device puts into a pack by itself."""
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else 0
    return pack_tokens(load_config("smollm2.yaml", [f"device={device}"]), sizes_of(model), free)


def agentrl_side(policy: Any, episodes: int, group_size: int, setting: Setting, folder: Path, say: Say) -> Step:
    """Return a step of agentrl's trainer, with one update on the batch."""
    batches: list[ScoredBatch] = []
    trainer = StratifiedTrainer(
        model=policy,
        processing_class=make_tokenizer(),
        sample=batches.pop,
        scorer=lambda model: Scorer(model, tokens=setting.tokens or run_tokens(model, setting.device), merge=True),
        updates=Updates(group_size),
        # No engine sampled these episodes.
        prove_weights=False,
        on_trained=lambda done: say(f"agentrl: {done} of {episodes} episodes"),
        args=grpo_config(
            output_dir=str(folder),
            max_steps=1,
            use_cpu=setting.device == "cpu",
            bf16=False,
            gradient_checkpointing=False,
        ),
    )

    def step(workload: Workload) -> None:
        batches.append(ScoredBatch(workload.trajectories, workload.advantages, {}))
        trainer.training_step(trainer.model, {})

    return step


def trl_side(policy: Any, episodes: int, group_size: int, setting: Setting, folder: Path, say: Say) -> Step:
    """Return a step of TRL's own trainer, whose micro-batches of 4 rows are padded to the longest of the batch.

    Raises:
        ValueError: if the episodes are not a multiple of 4.
    """
    if episodes % ROWS:
        raise ValueError(f"{episodes} episodes are no whole number of micro-batches of {ROWS}")
    batches: list[dict[str, torch.Tensor]] = []

    class Trainer(GRPOTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> dict[str, torch.Tensor]:
            return {name: tensor.to(self.accelerator.device) for name, tensor in batches.pop().items()}

    parts = episodes // ROWS
    trainer = Trainer(
        model=policy,
        processing_class=make_tokenizer(),
        reward_funcs=lambda **unused: [],
        train_dataset=Dataset.from_dict({"prompt": [""]}),
        args=GRPOConfig(
            output_dir=str(folder),
            per_device_train_batch_size=ROWS,
            gradient_accumulation_steps=parts,
            num_generations=group_size,
            max_completion_length=None,
            loss_type="dapo",
            beta=0.0,
            use_cpu=setting.device == "cpu",
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
        ),
    )
    # The loop of Trainer.train sets it.
    trainer.current_gradient_accumulation_steps = parts

    def step(workload: Workload) -> None:
        rows = batch_tensors(workload.trajectories, pad_id=0)
        # TRL has neither where its own engine samples.
        del rows["turn_index"], rows["sampling_per_token_logps"]
        rows |= {"advantages": torch.tensor(workload.advantages), "num_items_in_batch": rows["tool_mask"].sum()}
        batches.append(rows)
        for part in range(parts):
            trainer.training_step(trainer.model, {}, None)
            say(f"TRL: {part + 1} of {parts} micro-batches")

    return step


SIDES: dict[str, Callable[..., Step]] = {"agentrl": agentrl_side, "trl": trl_side}


def measure(side: str, workload: Workload, setting: Setting, folder: str, products: bool) -> Measured:
    """Take one step of a side and write its LoRA gradients [N], by the parameters' names, into `folder`/gradients.npy.

    A step before it warms up: of few tokens on a CPU, of all of them on CUDA, where kernels are compiled for their shapes.

    Args:
        side: a name of `SIDES`.
        workload: its episodes.
        setting: of both sides.
        folder: the step's own, there already.
        products: whether the rate of bare products is measured after the step.
    """
    began = time.perf_counter()

    def say(text: str) -> None:
        print(f"{time.perf_counter() - began:8.1f} s  {text}", flush=True)

    torch.set_num_threads(setting.threads)
    say(f"{side}: loading the model, and a step to warm up")
    policy = make_policy(setting)
    workload = workload.within(policy.config.vocab_size)
    step = SIDES[side](policy, len(workload.trajectories), workload.group_size, setting, Path(folder), say)
    step(workload if setting.device == "cuda" else workload.shortened(WARM_UP))
    policy.zero_grad()
    with torch.no_grad():
        # As after an optimizer step, so that what agentrl makes of the adapters' weights is made anew.
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.001)
    before = _memory(setting.device, peak=False)
    _forget_peak(setting.device)
    say(f"{side}: the step")
    started = time.perf_counter(), time.process_time()
    step(workload)
    _wait(setting.device)
    seconds, processor = time.perf_counter() - started[0], time.process_time() - started[1]
    peak = _memory(setting.device, peak=True)
    np.save(Path(folder) / "gradients.npy", gradients(policy))
    rate = product_rate(policy, setting.device, say) if products else None
    return Measured(seconds, processor, peak, before, rate, counts(policy, workload))


def gradients(policy: Any) -> np.ndarray:
    """Return all gradients of a policy as float32 [N], by the names of its parameters."""
    found = sorted((name, p.grad) for name, p in policy.named_parameters() if p.grad is not None)
    return torch.cat([gradient.flatten() for _, gradient in found]).cpu().numpy()


def product_rate(policy: Any, device: str, say: Say) -> float:
    """Return the FLOP/s of bare matrix products: of every linear layer below the adapters with 1024 tokens, forward and
    backward to the input."""
    weights = [layer.get_base_layer().weight.detach() for layer in _adapted(policy)]
    inputs = {width: torch.randn(CHUNK, width, device=device) for weight in weights for width in weight.shape}
    seconds = []
    say("matrix products")
    for number in range(PASSES + 1):
        _wait(device)
        started = time.perf_counter()
        for weight in weights:
            torch.mm(inputs[weight.shape[1]], weight.T)
            torch.mm(inputs[weight.shape[0]], weight)
        _wait(device)
        # The first pass warms up.
        seconds += [time.perf_counter() - started] if number else []
    return 4 * CHUNK * sum(weight.numel() for weight in weights) / statistics.median(seconds)


def counts(policy: Any, workload: Workload) -> dict[str, int]:
    """Return what a step has to compute: tokens, trained and different ones, and the useful FLOPs.

    Useful is each product once for each different token, at 2 FLOPs a multiplication:

    - linear layers below the adapters: forward, and backward to their input;
    - adapters, of which the merged weight takes care forward: two thin products for each of both factors' gradients;
    - attention: two products forward and four backward for each token and one that it sees;
    - the layer for logits: forward and backward to its input, for each different prediction.
    """
    tensors = batch_tensors(workload.trajectories, pad_id=0)
    everyone = torch.ones(len(workload.trajectories), dtype=torch.bool)
    (tree,) = pack(Minibatch(tensors, everyone).sequences(), tokens=workload.tokens)
    sizes, unique = sizes_of(policy), len(tree)
    parameters = sum(layer.get_base_layer().weight.numel() for layer in _adapted(policy))
    seen = int(tree.position_ids.sum()) + unique
    return {
        "episodes": len(workload.trajectories),
        "tokens": workload.tokens,
        "trained": workload.trained,
        "unique": unique,
        "padded": len(workload.trajectories) * (tensors["prompt_ids"].shape[1] + tensors["completion_ids"].shape[1]),
        "linear_parameters": parameters,
        "linear_flops": 2 * 2 * parameters * unique,
        "adapter_flops": 2 * 2 * sizes.adapter * unique,
        "attention_flops": 2 * 6 * sizes.layers * sizes.queries * seen,
        "logits_flops": 2 * 2 * sizes.hidden * sizes.vocabulary * len(tree.sources),
    }


def useful_flops(counted: Mapping[str, int]) -> int:
    """Return the useful FLOPs of a step, see `counts`."""
    return sum(count for name, count in counted.items() if name.endswith("_flops"))


def _adapted(policy: Any) -> list[Any]:
    return [module for module in policy.modules() if hasattr(module, "lora_A") and hasattr(module, "get_base_layer")]


def _memory(device: str, peak: bool) -> float:
    """Return the memory in MiB that this process holds on the device, or the most that it has held."""
    if device == "cuda":
        return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / 2**20
    if peak:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def _forget_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
