"""A tiny model that every engine can load, and adapters for it."""

import pytest
from tiny import tiny_llama


@pytest.fixture(scope="session")
def tiny_model(tokenizer, tmp_path_factory):
    """A random Llama of 512 ids whose own generation settings would bias every sample, as many chat models' do."""
    return _save_model(tokenizer, tmp_path_factory.mktemp("tiny-model"), seed=0)


@pytest.fixture(scope="session")
def other_model(tokenizer, tmp_path_factory):
    """The same with other weights."""
    return _save_model(tokenizer, tmp_path_factory.mktemp("other-model"), seed=1)


def _save_model(tokenizer, folder, seed):
    from transformers import GenerationConfig

    model = tiny_llama(
        512,
        seed=seed,
        max_position_embeddings=256,
        initializer_range=0.25,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.3,
        top_k=3,
        top_p=0.5,
        repetition_penalty=1.5,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def adapters(tiny_model):
    """The files of three adapters, each with other weights and none of them close to the model alone."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from agentrl.training.adapter import adapter_files

    policy = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model),
        LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    made = []
    for seed in range(3):
        torch.manual_seed(seed)
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        made.append(adapter_files(policy))
    return made
