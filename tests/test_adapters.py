"""An adapter is what the config says, plain LoRA, and made for the model; whatever is not is refused before anything starts."""

import json
from dataclasses import fields
from types import SimpleNamespace

import pytest

from agentrl.adapters import adapter_folder, check_tensors, read_adapter
from agentrl.config import ConfigError, parse_config
from agentrl.models import ModelError

MADE = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": ["v_proj", "q_proj"]}


def folder_of(folder, made=MADE, weights=True, **lora):
    """Write `made` as an adapter's config and ask for the adapter with a config of rank 4 and alpha 8."""
    (folder / "adapter_config.json").write_text(made if isinstance(made, str) else json.dumps(made))
    if weights:
        (folder / "adapter_model.safetensors").touch()
    model = {"path": "some/model", "adapter": str(folder), "lora": {"rank": 4, "alpha": 8.0} | lora}
    return adapter_folder(parse_config({"name": "small", "model": model}, source="test"))


@pytest.mark.parametrize("lora", [{}, {"target_modules": ["q_proj", "v_proj"]}])
def test_an_adapter_that_is_what_the_config_says_is_taken(tmp_path, lora):
    assert folder_of(tmp_path, **lora) == tmp_path


def test_an_adapter_that_is_scaled_by_the_root_of_its_rank_is_taken_where_the_config_says_so(tmp_path):
    assert folder_of(tmp_path, MADE | {"use_rslora": True}, rslora=True) == tmp_path
    with pytest.raises(ConfigError, match="rslora False differs from the rslora True"):
        folder_of(tmp_path, MADE | {"use_rslora": True})


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 8}, "model.lora.rank 8 differs from the rank 4 of .*; set it to 4"),
        ({"alpha": 16.0}, "model.lora.alpha 16.0 differs from the alpha 8"),
        ({"dropout": 0.5}, "model.lora.dropout 0.5 differs from the dropout 0.0"),
        ({"rslora": True}, "model.lora.rslora True differs from the rslora False of .*; set it to False"),
        ({"target_modules": ["q_proj"]}, r"model.lora.target_modules \['q_proj'\] differs"),
    ],
)
def test_settings_that_the_adapter_does_not_have_are_refused(tmp_path, lora, message):
    with pytest.raises(ConfigError, match=message):
        folder_of(tmp_path, **lora)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ('{\n "peft_type": "LORA",\n "r": 16,\n "lora_', "adapter_config.json is damaged, it is not JSON: .*line 4"),
        ("[]", "an adapter of type None; give one of type LORA"),
        ({"peft_type": "IA3"}, "an adapter of type IA3; give one of type LORA"),
        ({k: v for k, v in MADE.items() if k != "r"}, "adapter_config.json: r is missing"),
        (MADE | {"lora_alpha": "much"}, "lora_alpha is much"),
        (MADE | {"target_modules": None}, "target_modules is None"),
        (MADE | {"use_dora": True}, "use_dora True is more than plain LoRA"),
        (MADE | {"modules_to_save": ["lm_head"]}, r"modules_to_save \['lm_head'\] is more than plain LoRA"),
        (MADE | {"bias": "lora_only"}, "bias 'lora_only' is more than plain LoRA"),
        (MADE | {"alpha_pattern": {"q_proj": 16}}, "alpha_pattern .* is more than plain LoRA"),
        (MADE | {"init_lora_weights": "pissa_niter_4"}, "init_lora_weights pissa_niter_4 changes the base model"),
        (MADE | {"init_lora_weights": "lora_ga"}, "init_lora_weights lora_ga changes the base model"),
    ],
)
def test_what_is_no_plain_lora_adapter_is_refused(tmp_path, made, message):
    with pytest.raises(ModelError, match=message):
        folder_of(tmp_path, made)


def test_every_variant_of_lora_that_changes_what_a_layer_gives_is_refused(tmp_path):
    from peft import LoraConfig

    variants = {field.name for field in fields(LoraConfig) if field.metadata.get("is_lora_variant")}
    # Its forward pass is plain LoRA's, only the backward one is not.
    for name in sorted(variants - {"velora_config"}):
        with pytest.raises(ModelError, match=f"{name} .* is more than plain LoRA"):
            folder_of(tmp_path, MADE | {name: {"some": 1}})


def test_settings_at_their_defaults_are_plain_lora(tmp_path):
    from peft import LoraConfig

    made = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]).to_dict()
    made["target_modules"] = sorted(made["target_modules"])
    assert folder_of(tmp_path, made) == tmp_path


def test_an_adapter_without_safetensors_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"no adapter_model\.safetensors; give the folder of a PEFT adapter"):
        folder_of(tmp_path, weights=False)


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    model = {"path": "some/model", "adapter": str(tmp_path)}
    with pytest.raises(ModelError, match=r"model\.adapter .* holds no adapter_config\.json; give the folder of a PEFT"):
        adapter_folder(parse_config({"name": "small", "model": model}, source="test"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from tiny import tiny_llama

    folder = tmp_path_factory.mktemp("model")
    tiny_llama(64, hidden=16).save_pretrained(folder)
    return str(folder)


def adapter_of(model, folder, **settings):
    """Save an adapter for the model in `folder`, as PEFT does, and return its folder."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    lora = LoraConfig(r=4, lora_alpha=8, **({"target_modules": "all-linear"} | settings))
    get_peft_model(AutoModelForCausalLM.from_pretrained(model), lora).save_pretrained(folder)
    return folder


def change_tensors(folder, change):
    from safetensors.numpy import load_file, save_file

    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], r".*\.1\..*(up|down)_proj", ["embed_tokens"]])
def test_an_adapter_of_the_model_fits_it(model, tmp_path, targets):
    check_tensors(adapter_of(model, tmp_path, target_modules=targets), model)


def test_an_adapter_that_leaves_out_some_of_its_targets_fits(model, tmp_path):
    check_tensors(adapter_of(model, tmp_path / "names", exclude_modules=["q_proj"]), model)
    check_tensors(
        adapter_of(model, tmp_path / "layers", target_modules=["q_proj", "v_proj"], layers_to_transform=[1]), model
    )


def test_targets_that_are_no_regular_expression_are_named(model, tmp_path):
    folder = adapter_of(model, tmp_path)
    made = json.loads((folder / "adapter_config.json").read_text()) | {"target_modules": "(q_proj"}
    (folder / "adapter_config.json").write_text(json.dumps(made))
    with pytest.raises(ModelError, match=r"does not fit .*unterminated"):
        check_tensors(folder, model)


def test_tensors_that_find_no_module_are_named_with_modules_that_find_no_tensor(model, tmp_path):
    """So are adapters named that were trained on a model which another one wraps."""
    folder = adapter_of(model, tmp_path)
    change_tensors(
        folder, lambda t: {name.replace("model.layers", "model.language_model.layers"): t[name] for name in t}
    )
    with pytest.raises(ModelError) as refused:
        check_tensors(folder, model)
    assert "28 of its 28 tensors find no module in" in str(refused.value)
    assert "base_model.model.model.language_model.layers.0.mlp.down_proj.lora_A.weight" in str(refused.value)
    assert "28 of the 28 tensors that its config describes are missing" in str(refused.value)
    assert "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight" in str(refused.value)


def test_a_single_missing_tensor_is_enough(model, tmp_path):
    folder = adapter_of(model, tmp_path)
    last = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    change_tensors(folder, lambda tensors: {name: value for name, value in tensors.items() if name != last})
    with pytest.raises(ModelError, match=rf"1 of the 28 tensors that its config describes are missing, such as {last}"):
        check_tensors(folder, model)


def test_a_target_that_is_no_module_is_named(model, tmp_path):
    folder = adapter_of(model, tmp_path, target_modules=["q_proj", "gate"])
    with pytest.raises(ModelError, match="target_modules gate are no modules of"):
        check_tensors(folder, model)


def test_targets_none_of_which_is_a_module_are_named(model, tmp_path):
    folder = adapter_of(model, tmp_path)
    made = json.loads((folder / "adapter_config.json").read_text()) | {"target_modules": ["query", "value"]}
    (folder / "adapter_config.json").write_text(json.dumps(made))
    with pytest.raises(ModelError, match=r"does not fit .*query"):
        check_tensors(folder, model)


def test_an_adapter_of_a_wider_model_is_refused(model, tmp_path):
    from tiny import tiny_llama

    tiny_llama(64, hidden=32).save_pretrained(tmp_path / "wider")
    folder = adapter_of(tmp_path / "wider", tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"lora_A.weight has the shape \[4, 64\], and .* needs \[4, 32\]"):
        check_tensors(folder, model)


def test_weights_that_are_cut_off_are_refused(model, tmp_path):
    path = adapter_of(model, tmp_path) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:1_000])
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors cannot be read"):
        check_tensors(tmp_path, model)


def test_the_files_of_an_adapter_are_read_as_they_are(model, tmp_path):
    files = read_adapter(adapter_of(model, tmp_path))
    assert files == {
        name: (tmp_path / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")
    }


@pytest.mark.parametrize("engine", ["vllm", "transformers"])
@pytest.mark.parametrize("trains", [True, False])
def test_an_adapter_of_another_model_is_refused_before_retriever_and_engines_start(
    model, tmp_path, monkeypatch, engine, trains
):
    import ray

    from agentrl.rollout.cluster import cluster

    context = SimpleNamespace(address_info={"session_dir": "/tmp/session"})
    monkeypatch.setattr(ray, "init", lambda **_: context)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 9.0})
    folder = adapter_of(model, tmp_path)
    change_tensors(
        folder, lambda t: {name.replace("model.layers", "model.language_model.layers"): t[name] for name in t}
    )
    settings = {"path": model, "adapter": str(folder), "lora": {"rank": 4, "alpha": 8.0}}
    retriever = {"kind": "http", "url": "http://127.0.0.1:9/retrieve"}
    tree = {
        "name": "t",
        "model": settings,
        "engine": {"kind": engine},
        "retriever": retriever,
        "training": {"steps": 1},
    }
    config, phases = parse_config(tree, "test"), []
    with (
        pytest.raises(ModelError, match="tensors find no module"),
        cluster(config, phases.append, beside=object() if trains else None),
    ):
        pass
    assert phases == ["Ray", "model files"]
