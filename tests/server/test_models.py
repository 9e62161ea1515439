import dataclasses
import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from server import models
from server.models import (
    DEFAULT_MODEL,
    EMBEDDED,
    VISION_MODEL,
    Gguf,
    ModelError,
    Packaged,
    is_prepared,
    prepare,
)

SMALL = b"not really a model"


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """The real model, downloaded and converted once."""
    home = tmp_path_factory.mktemp("models-home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIMTAB_HOME", str(home))
        return prepare(DEFAULT_MODEL, report=silent)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def conversions(home, monkeypatch):
    """Replaces source and conversion by small stand-ins; the list holds one entry for each run."""
    runs = []

    def convert(gguf, folder, report):
        runs.append(gguf)
        (folder / "model.safetensors").write_bytes(SMALL)
        (folder / "config.json").write_text("{}", encoding="utf-8")

    monkeypatch.setattr(models, "obtain", lambda file, scratch, report: scratch / file.member)
    monkeypatch.setattr(models, "convert", convert)
    return runs


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """Makes the model's file one of an installed package; returns its path."""
    package = tmp_path / "packages" / "packaged_model"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    file = package / "tiny.gguf"
    file.write_bytes(SMALL)
    monkeypatch.syspath_prepend(str(package.parent))
    gguf = Gguf("packaged-model", "1.0", "packaged_model/tiny.gguf", len(SMALL), "0" * 64)
    model = dataclasses.replace(EMBEDDED[DEFAULT_MODEL], file=gguf)
    monkeypatch.setattr(models, "EMBEDDED", {DEFAULT_MODEL: model})
    return file


@pytest.fixture
def inside(tmp_path, monkeypatch):
    """Makes a model of a sealed folder of the package; returns the folder."""
    folder = tmp_path / "package" / "tiny"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(SMALL)
    models.seal(folder)
    model = dataclasses.replace(EMBEDDED[VISION_MODEL], file=Packaged(str(folder)))
    monkeypatch.setattr(models, "EMBEDDED", {VISION_MODEL: model})
    return folder


def silent(text):
    return None


@pytest.mark.slow
def test_converted_model_is_a_checkpoint_of_transformers(converted):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(converted)
    assert (config.model_type, config.num_hidden_layers, config.num_attention_heads) == (
        "llama",
        30,
        9,
    )
    assert (
        not {"quantization_config", "_name_or_path"}
        & json.loads((converted / "config.json").read_text(encoding="utf-8")).keys()
    )
    tokenizer = AutoTokenizer.from_pretrained(converted)
    model = AutoModelForCausalLM.from_pretrained(converted)
    assert model.dtype == torch.bfloat16
    tokens = tokenizer("The capital of France is", return_tensors="pt")
    logits = model(**tokens).logits
    assert torch.isfinite(logits).all()
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"


@pytest.mark.slow
def test_converted_model_has_its_chat_template(converted):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(converted)
    messages = [{"role": "user", "content": "Hello"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.eos_token == "<|im_end|>"


@pytest.mark.slow
def test_converted_model_is_reused_without_a_word(converted, monkeypatch):
    monkeypatch.setenv("TRIMTAB_HOME", str(converted.parent.parent))
    reports = []
    assert prepare(DEFAULT_MODEL, report=reports.append) == converted
    assert is_prepared(DEFAULT_MODEL) == converted
    assert reports == []


def test_prepared_once(conversions, home):
    reports = []
    assert is_prepared(DEFAULT_MODEL) is None
    folder = prepare(DEFAULT_MODEL, report=reports.append)
    assert folder == home / "models" / DEFAULT_MODEL
    assert (folder / "model.safetensors").read_bytes() == SMALL
    assert str(folder) in reports[-1]
    assert prepare(DEFAULT_MODEL, report=silent) == folder
    assert is_prepared(DEFAULT_MODEL) == folder
    assert len(conversions) == 1


def test_prepared_model_needs_no_write_access(conversions, monkeypatch):
    folder = prepare(DEFAULT_MODEL, report=silent)

    def refuse(*arguments):
        raise PermissionError("read-only file system")

    monkeypatch.setattr(models, "locked", refuse)
    assert prepare(DEFAULT_MODEL, report=silent) == folder


def truncate(folder):
    (folder / "model.safetensors").write_bytes(SMALL[:-1])


def flip_a_byte(folder):
    (folder / "model.safetensors").write_bytes(bytes([SMALL[0] ^ 1]) + SMALL[1:])


def remove_a_file(folder):
    (folder / "config.json").unlink()


def spoil_the_manifest(folder):
    (folder / "manifest.json").write_text("{", encoding="utf-8")


def empty_the_manifest(folder):
    (folder / "manifest.json").write_text("[]", encoding="utf-8")


def age_the_recipe(folder):
    (folder / "manifest.json").write_text('{"recipe": 0, "files": {}}', encoding="utf-8")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (truncate, "model.safetensors has changed"),
        (flip_a_byte, "model.safetensors has changed"),
        (remove_a_file, "config.json is missing"),
        (spoil_the_manifest, "manifest.json cannot be read"),
        (empty_the_manifest, "manifest.json cannot be read"),
        (age_the_recipe, "made by another version"),
    ],
)
def test_damaged_cache_is_rebuilt_with_a_message(conversions, home, spoil, reason):
    folder = prepare(DEFAULT_MODEL, report=silent)
    spoil(folder)
    assert is_prepared(DEFAULT_MODEL) is None
    reports = []
    assert prepare(DEFAULT_MODEL, report=reports.append) == folder
    assert reason in reports[0]
    assert (folder / "model.safetensors").read_bytes() == SMALL
    assert is_prepared(DEFAULT_MODEL) == folder
    assert len(conversions) == 2


def test_what_a_killed_process_left_is_removed(conversions, home):
    abandoned = home / "models" / f".{DEFAULT_MODEL}.tmp-abandoned"
    abandoned.mkdir(parents=True)
    (abandoned / "model.safetensors").write_bytes(SMALL)
    folder = prepare(DEFAULT_MODEL, report=silent)
    assert [entry.name for entry in folder.parent.iterdir() if entry.is_dir()] == [DEFAULT_MODEL]


def test_failed_conversion_leaves_nothing(conversions, home, monkeypatch):
    def fail(gguf, folder, report):
        (folder / "model.safetensors").write_bytes(SMALL)
        raise OSError("no space left on device")

    monkeypatch.setattr(models, "convert", fail)
    with pytest.raises(ModelError, match=r"no space left on device.*TRIMTAB_HOME"):
        prepare(DEFAULT_MODEL, report=silent)
    assert not [entry for entry in (home / "models").iterdir() if entry.is_dir()]


def test_wrong_checksum_is_refused(home, packaged):
    found = models.describe(packaged)["sha256"]
    with pytest.raises(ModelError, match=f"expected SHA-256 {'0' * 64}, found {found}"):
        prepare(DEFAULT_MODEL, report=silent)
    assert is_prepared(DEFAULT_MODEL) is None


def test_file_of_an_installed_package_is_used(packaged, tmp_path):
    file = dataclasses.replace(
        models.EMBEDDED[DEFAULT_MODEL].file, sha256=models.describe(packaged)["sha256"]
    )
    assert models.obtain(file, tmp_path, silent) == packaged


def test_failed_download_says_what_to_do(home, monkeypatch):
    monkeypatch.setattr(models, "installed", lambda file: None)
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(ModelError, match=r"returned 1, see above.*Check that pip works"):
        prepare(DEFAULT_MODEL, report=silent)


def test_model_of_the_package_stays_where_it_is(inside, home):
    assert prepare(VISION_MODEL, report=silent) == is_prepared(VISION_MODEL) == inside
    assert not home.exists()


def test_damaged_model_of_the_package_is_refused(inside, home):
    truncate(inside)
    assert is_prepared(VISION_MODEL) is None
    with pytest.raises(ModelError, match=r"model.safetensors has changed.*install Trimtab again"):
        prepare(VISION_MODEL, report=silent)
    assert (inside / "model.safetensors").read_bytes() == SMALL[:-1]


def test_sealing_again_changes_nothing(inside):
    manifest = (inside / "manifest.json").read_bytes()
    models.seal(inside)
    assert (inside / "manifest.json").read_bytes() == manifest


def test_embedded_vision_model_is_whole_and_small(home):
    folder = prepare(VISION_MODEL, report=silent)
    assert sum(file.stat().st_size for file in folder.iterdir()) < 20_000_000


def test_embedded_vision_model_is_installed_with_the_package():
    root = Path(models.__file__).parents[1]
    data = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = data["tool"]["setuptools"]["package-data"]
    covered = patterns["*"] + patterns["server.embedded.shapes_llava"]
    files = models.location(VISION_MODEL).iterdir()
    assert [f.name for f in files if not any(f.match(pattern) for pattern in covered)] == []


def test_unknown_name_lists_the_known_ones():
    for call in (is_prepared, lambda name: prepare(name, report=silent)):
        with pytest.raises(ModelError, match=f"'gpt-9'.*{DEFAULT_MODEL}"):
            call("gpt-9")


def test_unusable_home_is_told(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("TRIMTAB_HOME", str(file))
    with pytest.raises(ModelError, match="set TRIMTAB_HOME"):
        prepare(DEFAULT_MODEL, report=silent)


def test_cache_folder(monkeypatch):
    for variable in ("TRIMTAB_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", "/home/ada")
    assert models.location("m") == Path("/home/ada/.cache/trimtab/models/m")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert models.location("m") == Path("/cache/trimtab/models/m")
    monkeypatch.setenv("TRIMTAB_HOME", "~/trimtab")
    assert models.location("m") == Path("/home/ada/trimtab/models/m")


SLOW_PREPARE = """
import sys, time
from pathlib import Path
from server import models

def convert(gguf, folder, report):
    Path(sys.argv[1], f"ran-{time.monotonic_ns()}").touch()
    time.sleep(0.5)
    (folder / "model.safetensors").write_bytes(b"x")

models.obtain = lambda file, scratch, report: scratch
models.convert = convert
print(models.prepare(models.DEFAULT_MODEL, report=lambda text: None))
"""


def test_two_processes_at_once_convert_once(home, tmp_path):
    command = [sys.executable, "-c", SLOW_PREPARE, str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    folders = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert folders == {str(home / "models" / DEFAULT_MODEL)}
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(list(tmp_path.glob("ran-*"))) == 1


def test_import_is_light():
    code = "import sys, server.models; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
