"""Exports: what is written is the erased model, or nothing is written; what was there before stays as it was."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file

from erase_concept import exports as exporting
from erase_concept.cli import main as cli
from erase_concept.errors import EraseError, RequestError
from erase_concept.exports import EXPORT_DTYPES, EXPORT_FORMATS, check_hub, export
from erase_concept.pipelines.formats import delta, single_file
from erase_concept.pipelines.formats import folder as folders
from erase_concept.pipelines.formats.delta import apply_delta, open_delta
from erase_concept.pipelines.formats.folder import save_pipeline
from erase_concept.pipelines.hub import silence_hub_logs
from erase_concept.pipelines.load import load
from erase_concept.pipelines.model import Diffusion, weights_hash
from erase_concept.prompts.concept import Concept
from erase_concept.recipe import make_recipe
from erase_concept.run import iter_erase
from erase_concept.run_folder import read_run
from erase_concept.tokens import own_tokens

TOKEN = "hf_0123456789"
UNET = "model.diffusion_model."


@pytest.fixture
def folder(tiny: Diffusion, square: Concept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a model and a run in it."""
    monkeypatch.chdir(tmp_path)
    save_pipeline(tiny, Path("model"))
    settings = {"steps": 2, "batch_size": 2, "lr": 1e-3}
    data = {"forget": 2, "retain": 2, "steps": 2}
    list(
        iter_erase(make_recipe({"model": "model", "concept": square, "data": data, "settings": settings}), Path("run"))
    )
    return tmp_path


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Call the command in this process; return exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["erase-concept", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


def place(name: str) -> Path:
    """Where to write a format."""
    return Path(name if name == "diffusers" else f"{name}.safetensors")


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """As on a disk that gets full: the system refuses every byte beyond that size."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("dtype", EXPORT_DTYPES)
def test_every_format_is_the_erased_model_in_that_dtype(folder: Path, dtype: str) -> None:
    before, kind = content(folder), EXPORT_DTYPES[dtype]
    erased, account = load("run"), read_run(Path("run"))
    with silence_hub_logs():
        state = {name: value.to(kind) for name, value in erased.unet.state_dict().items()}
    fits = {name: export(Path("run"), place(name), name, dtype=dtype) for name in EXPORT_FORMATS}
    assert {name for name, done in fits.items() if done.fit is not None} == {"lora"}

    with silence_hub_logs():
        pipeline = StableDiffusionPipeline.from_pretrained("diffusers", torch_dtype=kind, local_files_only=True)
        model, theirs = load("model", dtype=kind), load("run", dtype=kind)
    for name, part in theirs.states().items():
        assert all(torch.equal(value, getattr(pipeline, name).state_dict()[key]) for key, value in part.items())
    assert (folder / "diffusers" / "README.md").read_bytes() == (folder / "run/pipeline/README.md").read_bytes()

    unet = load_file("unet.safetensors")
    assert {name: value.dtype for name, value in unet.items()} == dict.fromkeys(state, kind)
    assert all(torch.equal(unet[name], value) for name, value in state.items())

    single = {key: value for key, value in load_file("single-file.safetensors").items() if key.startswith(UNET)}
    assert sorted(value.double().sum().item() for value in single.values()) == sorted(
        value.double().sum().item() for value in state.values()
    )
    apply_delta(open_delta(Path("delta.safetensors")), model.unet)
    assert weights_hash(model.unet) == weights_hash(theirs.unet)

    for name in ("unet", "single-file", "lora", "delta"):
        with safe_open(place(name), "pt") as file:
            about = file.metadata()
        assert (about["method"], about["concept"]) == ("salun", "square")
        assert about["mask_sha256"] == account["mask"]["sha256"]
        assert "circle" in about["recipe"]
        spec = {key for key in about if key.startswith("modelspec.")}
        if name == "delta":  # its hashes are of the models in its own dtype, and it is no model
            assert not spec
        else:
            assert about["base_unet_sha256"] == account["base"]["unet"]
            written = place(name).read_bytes()
            tensors = written[8 + int.from_bytes(written[:8], "little") :]
            assert about["modelspec.hash_sha256"] == "0x" + hashlib.sha256(tensors).hexdigest()
        if name in ("unet", "single-file"):  # the hash is of the UNet as it was rounded
            assert about["erased_unet_sha256"] == weights_hash(theirs.unet)
    info = read_run(Path("run"))
    assert [(one["file"], one["sha256"]) for one in info.pop("exports")] == [
        (place(name).name, None if name == "diffusers" else hashlib.sha256(place(name).read_bytes()).hexdigest())
        for name in EXPORT_FORMATS
    ]
    assert info == account  # the exports are noted, and nothing else is touched
    note = str(Path("run/run.json"))
    after = {name: value for name, value in content(folder).items() if name in before and name != note}
    assert after == {name: value for name, value in before.items() if name != note}
    assert not [name for name in content(folder) if "partial" in name]


def test_a_changed_text_encoder_is_in_the_formats_that_hold_one(tiny: Diffusion, square: Concept, folder: Path) -> None:
    values = {"method": "concept-ablation", "mask": {"scope": "text-encoder"}, "data": {"anchor": 2, "steps": 1}}
    settings = {"steps": 2, "batch_size": 2, "lr": 1e-2}
    asked = make_recipe({"model": "model", "concept": square, "settings": settings, **values})
    list(iter_erase(asked, Path("words")))
    for name in ("unet", "lora", "delta"):
        with pytest.raises(
            RequestError, match=f"format {name}: the run changed the text encoder; allowed: diffusers, s"
        ):
            export(Path("words"), Path("other.safetensors"), name)
    assert not Path("other.safetensors").exists()
    for name in ("diffusers", "single-file"):
        export(Path("words"), place(name), name)
    state = load("words").text_encoder.state_dict()
    with silence_hub_logs():
        theirs = StableDiffusionPipeline.from_pretrained("diffusers", local_files_only=True).text_encoder.state_dict()
    assert all(torch.equal(theirs[name], value) for name, value in state.items())
    table = tiny.text_encoder.get_input_embeddings().weight
    (found,) = (v for k, v in load_file("single-file.safetensors").items() if k.endswith("token_embedding.weight"))
    assert sorted((found != table).any(1).nonzero()[:, 0].tolist()) == sorted(own_tokens(tiny, square).tolist())


def test_a_card_says_what_a_delta_did(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    export(Path("run"), Path("d.safetensors"), "delta")
    account = read_run(Path("run"))
    steps = {"erased": ["model"], "base": ["erased", "--revert"], "moved": ["erased", "--transfer"]}
    cards = {}
    for name, arguments in steps.items():
        assert call(monkeypatch, capsys, "apply", "d.safetensors", *arguments, "-o", name)[0] == 0
        cards[name] = (folder / name / "README.md").read_text(encoding="utf-8")
        assert "square" in cards[name]
        assert "`salun`" in cards[name]
        assert account["base"]["unet"] in cards[name]
    assert "# model without square" in cards["erased"]
    assert "square given back" in cards["base"]
    assert [("Transferred" in cards[name]) for name in steps] == [False, False, True]
    assert [("| reverted | yes |" in cards[name]) for name in steps] == [False, True, False]


@pytest.mark.parametrize("name", [*EXPORT_FORMATS, "apply"])
def test_a_full_disk_gets_one_line_and_2_and_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    export(Path("run"), Path("d.safetensors"), "delta")
    before = content(folder)
    out = Path("out" if name == "apply" else place(name))
    request = ["apply", "d.safetensors", "model"] if name == "apply" else ["export", "run", "-f", name]
    with files_no_larger_than(20_000):
        code, _, err = call(monkeypatch, capsys, *request, "-o", str(out))
    assert (code, len(err.strip().splitlines())) == (2, 1)
    assert "File too large" in err
    assert content(folder) == before
    assert not out.exists()


def faulty(write: Any, part: str) -> Any:
    """A function that saves tensors, but the first of a name that ends so with its first bit turned."""

    def save(tensors: dict[str, torch.Tensor], *rest: Any) -> None:
        name = next(name for name in tensors if name.endswith(part))
        other = tensors[name].clone()
        other.view(-1).view(torch.uint8)[0] ^= 1
        write(tensors | {name: other}, *rest)

    return save


def test_what_cannot_be_read_back_as_it_was_is_removed(
    tiny: Diffusion, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that loses a bit, or a library that rounds."""
    before = content(folder)
    for module, name, part in ((folders, "unet", ""), (delta, "delta", ":changed"), (delta, "delta", ":steps")):
        with monkeypatch.context() as patch:
            patch.setattr(module, "save_tensors", faulty(module.save_tensors, part))
            with pytest.raises(EraseError, match="was not written as it is"):
                export(Path("run"), place(name), name)
    with monkeypatch.context() as patch:
        patch.setattr(single_file, "save_tensors", faulty(single_file.save_tensors, "diffusion_model.out.2.bias"))
        with pytest.raises(EraseError, match=r"could not be read back: .*conv_out.bias was not written as it is"):
            export(Path("run"), place("single-file"), "single-file")
    with monkeypatch.context() as patch:
        pipeline = load("model").pipeline()
        patch.setattr(Diffusion, "pipeline", lambda self: pipeline)
        with pytest.raises(EraseError, match=r"out/unet: .* was not written as it is".replace("/", r"[/\\]")):
            export(Path("run"), Path("out"), "diffusers")
        Path("out").mkdir()
        (Path("out") / "mine").touch()
        with pytest.raises(EraseError, match="was not written as it is"):
            save_pipeline(load("run"), Path("out"))
        (Path("out") / "mine").unlink()  # what was there before is still there
        Path("out").rmdir()
    assert content(folder) == before


WRONG: dict[str, tuple[list[str], str]] = {
    "format": (["-f", "onnx"], "--format onnx: allowed: diffusers, unet, single-file, lora, delta"),
    "dtype": (["--dtype", "int8"], "--dtype int8: allowed: fp32, fp16, bf16"),
    "rank of what": (["-f", "unet", "--rank", "4"], "--rank 4: goes with the format lora, not unet"),
    "style of what": (["--lora-style", "kohya"], "--lora-style kohya: goes with the format lora, not unet"),
    "no rank": (["-f", "lora", "--rank", "0"], "--rank 0: must be 1 or more"),
    "style": (["-f", "lora", "--lora-style", "peft"], "--lora-style peft: allowed: kohya, diffusers"),
    "public what": (["--public"], "goes with --push-to-hub"),
    "no owner": (["--push-to-hub", "name"], "--push-to-hub name: must be OWNER/NAME"),
    "no name": (["--push-to-hub", "a/b/c"], "--push-to-hub a/b/c: must be OWNER/NAME"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_requests_get_one_line_and_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, problem = WRONG[case]
    code, out, err = call(monkeypatch, capsys, "export", "run", "-o", "out", *arguments)
    assert (code, out, len(err.strip().splitlines())) == (2, "", 1)
    assert problem in err
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_over_or_into_a_model(folder: Path) -> None:
    before = content(folder)
    Path("a.safetensors").write_text("mine")
    for taken in ("model", "run", "a.safetensors", "model/b.safetensors", "run/pipeline/unet/b.safetensors", "unet"):
        with pytest.raises(RequestError, match=r"out .*(exists already|is never written to|must end in)"):
            export(Path("run"), Path(taken), "unet" if taken.endswith(("s", "t")) else "diffusers")
    assert Path("a.safetensors").read_text() == "mine"
    Path("a.safetensors").unlink()
    assert content(folder) == before


def test_a_base_model_that_changed_is_noticed_where_it_is_needed(tiny: Diffusion, folder: Path) -> None:
    with torch.no_grad():
        tiny.unet.conv_out.bias += 1
    save_pipeline(tiny, Path("model"))
    for name in ("lora", "delta"):
        with pytest.raises(RequestError, match=rf"its base model \S*model has changed since; {name} needs it"):
            export(Path("run"), place(name), name)
    export(Path("run"), place("unet"), "unet")


def test_a_lora_tells_what_it_misses(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = call(monkeypatch, capsys, "export", "run", "-f", "lora", "--rank", "3", "-o", "a.safetensors")
    fit = export(Path("run"), Path("b.safetensors"), "lora", rank=3).fit
    assert fit is not None
    assert code == 0
    assert f"{fit.errors[1]:.1%} at rank 1, {fit.errors[2]:.1%} at rank 2, {fit.errors[3]:.1%} at rank 3" in out
    assert f"{fit.left_out:.1%} of it is in biases and norms" in out
    first, second = load_file("a.safetensors"), load_file("b.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


class Hub(ThreadingHTTPServer):
    """What of the hub an upload needs; it keeps the repositories, by whether they are private, and their files."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.private: dict[str, bool] = {"me/seen": False}
        self.files: dict[str, dict[str, bytes]] = {"me/seen": {}}
        self.address = f"http://127.0.0.1:{self.server_port}"


class HubRequest(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def answer(self, code: int, body: Any) -> None:
        self.send_response(code)
        if code == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        text = json.dumps(body).encode()
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self) -> None:
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            self.answer(401, {"error": "Invalid credentials in Authorization header"})
        elif self.path == "/api/whoami-v2":
            self.answer(200, {"name": "me", "type": "user"})
        elif (repo := "/".join(self.path.split("/")[3:5])) in self.server.private:
            self.answer(200, {"id": repo, "private": self.server.private[repo], "siblings": [], "tags": []})
        else:
            self.answer(404, {"error": "Repository not found"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        repo = "/".join(self.path.split("/")[3:5])
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.server.private.setdefault(repo, asked.get("private") or asked.get("visibility") == "private")
            self.server.files.setdefault(repo, {})
            self.answer(200, {"url": f"{self.server.address}/{repo}"})
        elif "/preupload/" in self.path:
            found = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]]
            self.answer(200, {"files": [file | {"shouldIgnore": False} for file in found]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[repo][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"{self.server.address}/{repo}/commit/abc"
            self.answer(200, {"success": True, "commitOid": "abc", "commitUrl": url, "hookOutput": ""})
        else:
            self.answer(200, {"errors": [], "warnings": []})


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def online(folder: Path, endpoint: str, *requests: list[str]) -> list[dict[str, Any]]:
    """Call the command in a process of its own, which is online, for the hub's library reads all this when imported."""
    code = """
import contextlib, io, json, sys
from erase_concept.cli import main as cli

for request in json.loads(sys.argv[1]):
    sys.argv[1:] = request
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as end:
            print(json.dumps({"code": end.code, "out": out.getvalue(), "err": err.getvalue()}), file=sys.__stdout__)
"""
    env = {
        name: value for name, value in os.environ.items() if not name.startswith("HF_") and "proxy" not in name.lower()
    }
    env |= {"HF_ENDPOINT": endpoint, "HF_TOKEN": TOKEN, "HF_HOME": str(folder / "home")}
    command = [sys.executable, "-W", "ignore", "-c", code, json.dumps(requests)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=True)
    assert TOKEN not in done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_uploads_what_was_written_and_shows_it_to_nobody_unless_told(folder: Path, hub: Hub) -> None:
    export = ["export", "run", "-o"]
    done = online(
        folder,
        hub.address,
        [*export, "a.safetensors", "--push-to-hub", "me/a"],
        [*export, "b", "-f", "diffusers", "--push-to-hub", "me/b", "--public"],
        [*export, "c.safetensors", "--push-to-hub", "me/seen"],
    )
    assert [call["code"] for call in done] == [0, 0, 2]
    assert f"Uploaded to {hub.address}/me/a" in done[0]["out"]
    assert hub.private == {"me/a": True, "me/b": False, "me/seen": False}
    file = Path("a.safetensors").read_bytes()
    assert hub.files == {"me/a": {"a.safetensors": file}, "me/b": content(folder / "b"), "me/seen": {}}
    assert "--push-to-hub me/seen: is a public repository: set public" in done[2]["err"]
    assert not Path("c.safetensors").exists()
    assert not [name for name, text in content(folder).items() if TOKEN.encode() in text]


def test_offline_gets_one_line_and_1_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    request = ["export", "run", "-o", "out.safetensors", "--push-to-hub", "me/a"]
    unused = Hub()
    unused.server_close()
    (away,) = online(tmp_path, unused.address, request)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    code, _, err = call(monkeypatch, capsys, *request)  # the tests themselves are in offline mode
    for number, text in ((away["code"], away["err"]), (code, err)):
        (line,) = (line for line in text.splitlines() if line.startswith("erase-concept: "))
        assert (number, line) == (1, text.splitlines()[-1])
        assert line.startswith("erase-concept: nothing was uploaded to me/a: ")
        assert "Traceback" not in text
        assert TOKEN not in text
    assert "offline mode" in err


def test_without_a_token_it_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "get_token", lambda: None)
    with pytest.raises(RequestError, match="push_to_hub me/a: needs a token: run 'hf auth login' or set HF_TOKEN"):
        check_hub("me/a")


def test_a_token_in_an_error_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "get_token", lambda: TOKEN)

    def whoami(self: Any) -> None:
        raise ValueError(f"illegal header\nBearer {TOKEN}")

    monkeypatch.setattr(exporting.HfApi, "whoami", whoami)
    with pytest.raises(EraseError, match=r"illegal header Bearer \(the token\)$"):
        check_hub("me/a")
