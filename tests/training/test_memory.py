"""The memory plan counts what a model has and what autograd keeps, and refuses what cannot fit with a setting that helps."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from agentrl.config import ConfigError, parse_config
from agentrl.training.adapter import lora_config, save_adapter
from agentrl.training.memory import (
    activation_bytes,
    check_memory,
    engine_memory,
    least_tokens,
    most_utilization,
    store_bytes,
    tokens_held,
    tokens_that_fit,
    trainer_memory,
    trainer_room,
)
from agentrl.training.scoring import Scorer, TokenSequence
from agentrl.training.sizes import Sizes, read_sizes, sizes_of

GIB = 2**30

# Qwen2.5-3B with an adapter of rank 64 on all its linear layers, which `test_the_sizes_of_a_known_model` counts.
QWEN = Sizes(36, 2048, 11008, 2048, 256, 151936, 3_085_938_688, 2_774_532_096, 854_784, 119_734_272, 2_774_532_096)


def make_config(
    path="x/y", device="cuda", dtype="bfloat16", engine=(), rollout=(), training=(), agent=(), lora=(), model=()
):
    return parse_config(
        {
            "name": "t",
            "device": device,
            "model": {"path": str(path), "dtype": dtype, "lora": None if lora is None else {"rank": 8} | dict(lora)}
            | dict(model),
            "engine": dict(engine),
            "rollout": dict(rollout),
            "agent": {"max_episode_tokens": 4096} | dict(agent),
            "training": {"steps": 1, "gradient_checkpointing": True} | dict(training),
        },
        "test",
    )


def tiny(layers, **settings):
    return LlamaConfig(
        **{
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 176,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }
        | settings
    )


@pytest.fixture
def model(tmp_path):
    """A folder with the config of a small model, whose weights nobody needs."""
    tiny(3).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_the_sizes_of_a_model_are_those_of_its_weights(model, targets):
    config = make_config(model, lora={"target_modules": targets})
    sizes = read_sizes(config)
    base = LlamaForCausalLM(tiny(3))
    assert sizes.weights == sum(p.numel() for p in base.parameters())
    linear = {name: m.weight.shape for name, m in base.model.named_modules() if isinstance(m, torch.nn.Linear)}
    adapted = [s for name, s in linear.items() if targets == "all-linear" or name.rpartition(".")[2] in targets]
    assert sizes.adapted_weights == sum(out * into for out, into in adapted)
    assert sizes.adapted_inputs == sum(into + 8 for _, into in adapted)
    assert sizes.linear_weights == sum(out * into for out, into in linear.values())
    assert sizes.adapter == get_peft_model(base, lora_config(config)).get_nb_trainable_parameters()[0]
    assert (sizes.layers, sizes.queries, sizes.keys, sizes.vocabulary) == (3, 64, 32, 512)


def test_without_an_adapter_all_weights_of_a_model_are_trained(model):
    sizes = read_sizes(make_config(model, lora=None))
    assert sizes.whole
    assert sizes.trained == sizes.weights == sum(p.numel() for p in LlamaForCausalLM(tiny(3)).parameters())
    assert sizes.adapter == sizes.adapted_weights == 0
    assert sizes_of(LlamaForCausalLM(tiny(3))) == sizes


def test_an_adapter_with_dora_has_a_length_for_each_output_of_its_layers(model):
    plain, dora = (read_sizes(make_config(model, lora={"dora": on})) for on in (False, True))
    assert dora.adapter - plain.adapter == dora.dora_outputs > 0
    assert plain.dora_outputs == 0


def test_the_sizes_of_an_adapter_to_start_from_are_its_own(model, tmp_path):
    narrow = make_config(model, lora={"target_modules": ["q_proj"]})
    save_adapter(get_peft_model(LlamaForCausalLM(tiny(3)), lora_config(narrow)), tmp_path / "start")
    config = make_config(model)
    start = config.model_copy(update={"model": config.model.model_copy(update={"adapter": str(tmp_path / "start")})})
    assert read_sizes(start) == read_sizes(narrow) != read_sizes(config)


def test_the_sizes_of_a_known_model(tmp_path):
    LlamaConfig(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        attention_bias=True,
    ).save_pretrained(tmp_path)
    found = read_sizes(make_config(tmp_path, lora={"rank": 64}))
    # Qwen has no bias behind attention.
    assert replace(found, weights=found.weights - 36 * 2048) == QWEN


def test_the_sizes_of_a_model_that_is_not_here_are_not_known():
    assert read_sizes(make_config("nobody/has-this")) is None


def kept_by_autograd(layers, tokens, dtype, lora):
    """Bytes that autograd keeps of one pack beside the model's own weights."""
    policy = LlamaForCausalLM(tiny(layers))
    if lora is not None:
        policy = get_peft_model(policy.to(dtype), lora_config(make_config(lora=lora)))
    scorer = Scorer(policy, tokens=tokens, merge=dtype == torch.float32, dtype=dtype)
    ids = np.random.default_rng(0).integers(0, 512, tokens + 1)
    (pack,) = scorer.packs([TokenSequence(ids, np.arange(tokens // 2, tokens + 1))])
    own = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    kept, alive = {}, []

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        scores = scorer.score(pack)
    assert scores.logps.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [{}, {"dora": True}, None], ids=["lora", "dora", "all weights"])
def test_what_a_layer_keeps_of_a_token_is_what_autograd_keeps(tmp_path, dtype, lora):
    of = {(n, t): kept_by_autograd(n, t, getattr(torch, dtype), lora) for n in (2, 3) for t in (256, 512)}
    a_token = ((of[3, 512] - of[2, 512]) - (of[3, 256] - of[2, 256])) / 256
    tiny(3).save_pretrained(tmp_path)
    sizes = read_sizes(make_config(tmp_path, lora=lora))
    planned = activation_bytes(sizes, 1, dtype, checkpointing=False) / (sizes.layers + 1)
    # In fp32 the plan leaves out what the first factor of an adapter with DoRA gives, as many numbers as its rank.
    assert planned == pytest.approx(a_token, rel=0.03 if lora and dtype == "float32" else 0.01)


@given(st.integers(1, 10**6), st.sampled_from(["float32", "bfloat16"]), st.booleans())
def test_so_many_tokens_fit_as_take_the_room_that_there_is(tokens, dtype, checkpointing):
    room = activation_bytes(QWEN, tokens, dtype, checkpointing=checkpointing)
    assert tokens_that_fit(QWEN, room, dtype, checkpointing=checkpointing) == tokens
    assert tokens_that_fit(QWEN, room - 1, dtype, checkpointing=checkpointing) == tokens - 1
    assert tokens_that_fit(QWEN, -room, dtype, checkpointing=checkpointing) == 0


def test_checkpointing_keeps_less():
    with_it, without = (activation_bytes(QWEN, 4096, "bfloat16", checkpointing=on) for on in (True, False))
    assert with_it < without / 10


def test_a_model_with_weights_has_the_sizes_that_were_planned(model):
    config = make_config(model)
    assert sizes_of(get_peft_model(LlamaForCausalLM(tiny(3)), lora_config(config))) == read_sizes(config)


@given(st.integers(16, 192), st.booleans(), st.sampled_from([None, 0.3, 0.5]))
def test_packs_that_nobody_bounds_fit_the_trainers_room(gibibytes, checkpointing, share):
    card = gibibytes * GIB
    config = make_config(
        engine={} if share is None else {"gpus": share}, training={"gradient_checkpointing": checkpointing}
    )
    tokens = tokens_held(config, QWEN, card)
    assert 4096 <= tokens <= 32768
    if tokens > 4096:
        assert trainer_memory(config, QWEN, tokens).peak < trainer_room(config, card)


def test_a_pack_is_no_shorter_than_the_longest_episode_and_plain_passes_take_one_each():
    for bound, held in ((1000, 4096), (8192, 8192)):
        assert tokens_held(make_config(training={"tokens_per_micro_batch": bound}), QWEN, 80 * GIB) == held
        assert tokens_held(make_config(training={"tokens_per_micro_batch": bound}), QWEN, None) == held
    assert tokens_held(make_config(), QWEN, None) == 4096
    alone = make_config(training={"tokens_per_micro_batch": 8192, "packing": "none"})
    assert tokens_held(alone, QWEN, 80 * GIB) == 4096
    # Three calls and an answer of 96 tokens each; logits of them all are there at once.
    assert trainer_memory(alone, QWEN, 4096).logits == 4 * 96 * QWEN.vocabulary * 12


def test_the_trainers_memory_is_that_of_its_parts():
    plain, kl = (trainer_memory(make_config(training={"kl": {"coefficient": c}}), QWEN, 4096) for c in (0, 1e-3))
    assert plain.weights == 2 * QWEN.weights
    assert plain.trained == 16 * QWEN.adapter
    assert kl.trained == 20 * QWEN.adapter
    assert plain.peak == plain.weights + plain.trained + plain.context + plain.activations + plain.logits
    merged = trainer_memory(make_config(device="cpu", dtype="float32"), QWEN, 4096)
    assert merged.weights == 4 * (QWEN.weights + QWEN.adapted_weights)
    assert 0 < merged.context < GIB, "of libraries alone"


def test_weights_in_4_bits_take_a_quarter_and_a_little_more_in_trainer_and_engine():
    plain, quantized = (make_config(model={"quantization": kind}) for kind in (None, "nf4"))
    packed = QWEN.linear_weights * (4 + 0.127) / 8
    saved = 2 * QWEN.linear_weights - packed
    for plan in (lambda c: trainer_memory(c, QWEN, 4096), lambda c: engine_memory(c, QWEN, 80 * GIB)):
        assert plan(plain).weights - plan(quantized).weights == pytest.approx(saved, rel=1e-4)


@pytest.mark.parametrize(("name", "copies"), [("adamw", 4), ("adamw_8bit", 2.5), ("muon", 3)])
def test_moments_take_what_the_optimizer_keeps_of_them(name, copies):
    found = trainer_memory(make_config(training={"optimizer": {"name": name}}), QWEN, 4096)
    assert found.trained == 4 * copies * QWEN.adapter


def test_all_weights_take_a_gradient_and_two_moments_each_and_copies_in_bf16():
    whole = replace(QWEN, adapter=0, adapted_weights=0, adapted_inputs=0)
    plain, kl = (
        trainer_memory(make_config(lora=None, training={"kl": {"coefficient": c}}), whole, 4096) for c in (0, 1e-3)
    )
    assert plain.weights == (4 + 2) * QWEN.weights
    assert kl.weights - plain.weights == 2 * QWEN.weights
    assert plain.trained == kl.trained == 3 * 4 * QWEN.weights
    exact = trainer_memory(
        make_config(device="cpu", dtype="float32", lora=None, training={"kl": {"coefficient": 1e-3}}), whole, 4096
    )
    assert exact.weights == (4 + 4) * QWEN.weights
    assert plain.logits > trainer_memory(make_config(), QWEN, 4096).logits, "the output layer has a gradient"
    with pytest.raises(ConfigError, match=r"trainer needs .*train an adapter with model\.lora"):
        check_memory(make_config(lora=None), whole, 40 * GIB)
    check_memory(make_config(lora=None), whole, 80 * GIB)


@pytest.mark.parametrize(("name", "kept"), [("adamw", 8), ("adamw_8bit", 2), ("muon", 4)])
def test_embeddings_keep_two_moments_in_fp32_under_every_optimizer(name, kept):
    whole = replace(QWEN, adapter=0, adapted_weights=0, adapted_inputs=0)
    embeddings = QWEN.vocabulary * QWEN.hidden
    found = trainer_memory(make_config(lora=None, training={"optimizer": {"name": name}}), whole, 4096)
    assert found.trained == 4 * QWEN.weights + kept * (QWEN.weights - embeddings) + 8 * embeddings


def test_shares_of_a_model_that_no_card_can_load_whole_are_refused():
    larger = replace(QWEN, adapter=0, adapted_weights=0, adapted_inputs=0, weights=14_000_000_000)
    shares = {"shard": True, "workers": 8, "kl": {"coefficient": 1e-3}}
    config = make_config(lora=None, training=shares)
    assert trainer_memory(config, larger, 4096).peak < 70 * GIB
    with pytest.raises(ConfigError, match=r"while it loads the model, before training\.shard deals it out"):
        check_memory(config, larger, 70 * GIB)
    check_memory(config, larger, 100 * GIB)


def test_engines_that_get_a_whole_model_leave_no_room_for_adapters_and_the_store_holds_two_models():
    whole = replace(QWEN, adapter=0)
    for config, sizes in ((make_config(lora=None), whole), (make_config(lora={"dora": True}), QWEN)):
        assert engine_memory(config, sizes, 80 * GIB).weights == 2 * QWEN.weights
        assert store_bytes(config, sizes) > 2 * 2 * 2 * QWEN.weights


def test_keys_and_values_get_what_the_weights_leave_of_an_engines_part():
    engine = engine_memory(make_config(), QWEN, 80 * GIB)
    assert engine.token == 2 * 36 * 256 * 2
    assert engine.cache == pytest.approx(0.85 * 80 * GIB - engine.weights, abs=1)
    halved = engine_memory(make_config(engine={"gpus": 2}), QWEN, 80 * GIB)
    assert (2 * halved.token, 2 * halved.weights) == (engine.token, engine.weights)
    assert engine_memory(make_config(), QWEN, None).cache is None
    assert (
        engine_memory(make_config(device="cpu", dtype="float32", engine={"kv_cache_gib": 3}), QWEN, None).cache
        == 3 * GIB
    )


@pytest.mark.parametrize(
    ("card", "sections", "words"),
    [
        (6, {}, r"an engine needs .*engine\.gpu_memory_utilization 0\.85 of a card of 6\.0 GiB"),
        (24, {"engine": {"gpus": 0.2}}, r"an engine needs .*raise engine\.gpus"),
        (
            16,
            {"training": {"gradient_checkpointing": False}},
            r"trainer needs .*training\.gradient_checkpointing to true",
        ),
        (
            16,
            {"training": {"tokens_per_micro_batch": 32768}},
            r"trainer needs .*32,768 tokens.*lower training\.tokens_per_micro_batch",
        ),
        (9, {}, r"trainer needs .*lower agent\.max_episode_tokens"),
        (24, {"engine": {"gpus": 0.7}}, r"trainer needs .*engine\.gpu_memory_utilization to at most 0\.\d+"),
        (24, {"engine": {"gpus": 0.7}}, r"trainer needs .*engine\.sleep to true"),
        (
            24,
            {"engine": {"gpus": 0.5, "sleep": True, "gpu_memory_utilization": 0.9}},
            r"engines that are awake the trainer keeps .*engine\.gpu_memory_utilization to at most 0\.\d+",
        ),
    ],
)
def test_what_cannot_fit_is_refused_with_the_setting_to_change(card, sections, words):
    with pytest.raises(ConfigError, match=words):
        check_memory(make_config(**sections), QWEN, card * GIB)


@given(
    st.floats(8, 96),
    st.integers(1, 3),
    st.booleans(),
    st.integers(1, 8),
)
def test_the_greatest_share_that_is_advised_is_accepted_and_a_greater_one_is_not(card, workers, sleep, batch):
    card = int(card * GIB)

    def shared(utilization):
        return make_config(
            engine={"gpus": 0.9 / workers, "sleep": sleep, "gpu_memory_utilization": utilization},
            rollout={"workers": workers, "group_size": 8, "questions_per_step": 7},
            training={"tokens_per_micro_batch": 4096 * batch if batch > 4 else None},
        )

    most = most_utilization(shared(0.01), QWEN, card)
    engine = engine_memory(shared(0.01), QWEN, card)
    assume(most * card > engine.weights + 4096 * engine.token + 2)
    # Asleep or not, engines may leave less than the trainer takes.
    assume(
        trainer_memory(shared(0.01), QWEN, least_tokens(shared(0.01))).peak <= trainer_room(shared(most / 1.001), card)
    )
    check_memory(shared(most * (1 - 1e-9)), QWEN, card)
    with pytest.raises(ConfigError):
        check_memory(shared(most * 1.001), QWEN, card)


def test_the_store_holds_two_adapters_and_the_episodes_under_way():
    small = store_bytes(make_config(), replace(QWEN, adapter=1000))
    assert small == GIB
    many = {"group_size": 8, "questions_per_step": 512}
    fresh, ahead = (store_bytes(make_config(rollout=many | {"max_staleness": n}), QWEN) for n in (0, 1))
    assert fresh > 2 * 2 * 2 * QWEN.adapter
    assert ahead - fresh == fresh - 2 * 2 * 2 * QWEN.adapter
