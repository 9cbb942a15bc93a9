"""What can be grown: a Hugging Face folder, a name on the Hub, or a GGUF file, each as a folder with safetensors.

    source = locate("Qwen/Qwen2.5-0.5B")            by its spelling alone, see trainer.spec.is_path
    source.config()                                  what its config.json says, or would say; no weights are fetched
    with source.folder(scratch) as folder:           the weights, fetched or converted

A folder needs numpy alone, a name on the Hub huggingface_hub, a GGUF file transformers and torch. No code of a
checkpoint is run, and no pickle is read.
"""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from math import isclose
from pathlib import Path
from typing import Any, Protocol

from trainer.families import FAMILIES, FamilyError, family_of, read_config
from trainer.families.rope import ropes
from trainer.growth.apply import COMPANIONS, Progress
from trainer.growth.weights import INDEX, SourceError, unpickling
from trainer.spec import for_transformers, is_path

#: All of a repository that growing needs.
WEIGHTS = ("model.safetensors", "model-*.safetensors", INDEX)

#: Endings of files that hold weights as pickles.
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")

#: Families that llama.cpp has another name for.
_GGUF_NAMES = {"gemma3": "gemma3_text", "gptneox": "gpt_neox"}


class Located(Protocol):
    def config(self) -> dict[str, Any]:
        """The content of its config.json. Raises :class:`FamilyError` or :class:`SourceError`."""

    def folder(self, scratch: Path, progress: Progress | None = None) -> AbstractContextManager[Path]:
        """A folder with config.json, safetensors and what there is of a tokenizer.

        What has to be converted for that lies in `scratch` meanwhile. Raises :class:`SourceError` or OSError.
        """


def locate(name: str) -> Located:
    """The source of that name. Raises :class:`SourceError` where there can be none."""
    try:
        given = for_transformers(name)
    except ValueError as error:
        raise SourceError(f"{name}: {error}") from None
    if not is_path(name):
        return OnHub(name)
    path = Path(given)
    if path.is_dir():
        return _in_folder(path)
    if not path.exists():
        raise SourceError(f"{name}: there is no such file or folder")
    if path.suffix == ".gguf":
        return Gguf(path)
    if path.suffix in _PICKLES:
        raise SourceError(
            f"{name}: holds pickled weights, which can run code when read. {unpickling(str(path.parent))}"
        )
    raise SourceError(f"{name}: is a file; the folder that has it, with config.json, would be right")


def _in_folder(path: Path) -> Located:
    files = sorted(path.glob("*.gguf"))
    if not files or any(path.glob("*.safetensors")):
        return Folder(path)
    if len(files) > 1:
        raise SourceError(f"{path}: holds {len(files)} GGUF files; name one of them, such as {files[0]}")
    return Gguf(files[0])


@dataclass(frozen=True)
class Folder:
    """A Hugging Face folder on this machine."""

    path: Path

    def config(self) -> dict[str, Any]:
        return read_config(self.path)

    @contextmanager
    def folder(self, scratch: Path, progress: Progress | None = None) -> Iterator[Path]:
        yield self.path


@dataclass(frozen=True)
class OnHub:
    """A model by its name on the Hugging Face Hub, or in the cache of it."""

    name: str

    def config(self) -> dict[str, Any]:
        return read_config(self._snapshot("config.json", INDEX))

    @contextmanager
    def folder(self, scratch: Path, progress: Progress | None = None) -> Iterator[Path]:
        first = self._snapshot("config.json", INDEX)
        family_of(read_config(first))  # before gigabytes are fetched
        commit = first.name
        wanted = ("config.json", *WEIGHTS, *COMPANIONS)
        size = self._size(commit, wanted)
        if progress is not None and size:
            progress(0, size, "fetching")
        folder = self._snapshot(*wanted, revision=commit)
        if not any(folder.glob("*.safetensors")):
            raise SourceError(self._way_out(commit))
        if progress is not None and size:
            progress(size, size, "fetching")
        yield folder

    def _size(self, commit: str, wanted: tuple[str, ...]) -> int:
        """Bytes that are still to be fetched; 0 offline. Raises OSError where the cache has no room for them."""
        from huggingface_hub import constants, snapshot_download
        from huggingface_hub.errors import DryRunError

        with self._said():
            try:
                files = snapshot_download(self.name, revision=commit, allow_patterns=list(wanted), dry_run=True)
            except DryRunError:  # what there is in the cache will have to do
                return 0
        size = sum(int(file.file_size or 0) for file in files if file.will_download)
        cache = Path(constants.HF_HUB_CACHE)
        free = shutil.disk_usage(next(folder for folder in (cache, *cache.parents) if folder.exists())).free
        if free < size:
            raise OSError(
                errno.ENOSPC, f"{size / 1e9:.2f} GB will be fetched, and {free / 1e9:.2f} GB are free", str(cache)
            )
        return size

    def _snapshot(self, *wanted: str, revision: str | None = None) -> Path:
        from huggingface_hub import snapshot_download

        with self._said():
            return Path(snapshot_download(self.name, revision=revision, allow_patterns=list(wanted)))

    @contextmanager
    def _said(self) -> Iterator[None]:
        """What goes wrong with the Hub, as a sentence."""
        try:
            yield
        except Exception as error:  # of the libraries underneath, too: they have no class in common
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise SourceError(
                f"{self.name}: cannot be fetched from the Hub: {reason} A local path would begin with /, ./, ../ or ~."
            ) from None

    def _way_out(self, commit: str) -> str:
        from huggingface_hub import HfApi

        files: list[str] = []
        with contextlib.suppress(SourceError), self._said():
            files = HfApi().list_repo_files(self.name, revision=commit)
        if any(file.endswith(_PICKLES) for file in files):
            return f"{self.name}: has only pickled weights, which can run code when read. {unpickling(self.name)}"
        if ggufs := sorted(file for file in files if file.endswith(".gguf")):
            return (
                f"{self.name}: has its weights as GGUF; fetch one file and grow that: "
                f"hf download {self.name} {ggufs[0]} --local-dir {Path(self.name).name}"
            )
        return f"{self.name}: has no model.safetensors and no {INDEX}"


@dataclass(frozen=True)
class Gguf:
    """A GGUF file, as llama.cpp reads it. transformers undoes its quantisation, in memory, to float32."""

    path: Path

    def config(self) -> dict[str, Any]:
        theta = self._checked()
        from transformers import AutoConfig

        with self._said():
            config = AutoConfig.from_pretrained(str(self.path.parent), gguf_file=self.path.name, local_files_only=True)
            read = {key: value for key, value in config.to_dict().items() if key != "quantization_config"}
            if theta is not None and not any(isclose(theta, r["rope_theta"], rel_tol=1e-6) for r in ropes(read)):
                raise ValueError(f"transformers does not read its rope_theta, {theta:g}; use the original")
            return read

    @contextmanager
    def folder(self, scratch: Path, progress: Progress | None = None) -> Iterator[Path]:
        config = self.config()
        family_of(config)
        from huggingface_hub import save_torch_model
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar

        size = self.path.stat().st_size
        if progress is not None:
            disable_progress_bar()
            progress(0, size, "converting")
        scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".from-gguf-", dir=scratch) as converted:
            with self._said():
                at = {"gguf_file": self.path.name, "local_files_only": True}
                model, loaded = AutoModelForCausalLM.from_pretrained(
                    str(self.path.parent), output_loading_info=True, dtype="float32", **at
                )
                if lacks := sorted(loaded["missing_keys"]):  # transformers would fill them with random numbers
                    raise ValueError(f"it lacks the weights {', '.join(lacks[:3])}{' ...' if lacks[3:] else ''}")
                # Not its own save_pretrained, which takes it for quantised still.
                save_torch_model(model, converted)
                del model
                (Path(converted) / "config.json").write_text(json.dumps(config), encoding="utf-8")
                AutoTokenizer.from_pretrained(str(self.path.parent), **at).save_pretrained(converted)
            if progress is not None:
                progress(size, size, "converting")
            yield Path(converted)

    def _checked(self) -> float | None:
        """RoPE's theta, where it says one.

        Raises :class:`FamilyError` for an architecture that cannot be grown, before torch is needed to know it.
        """
        from gguf import GGUFReader

        with self._said():
            reader = GGUFReader(self.path)
            field = reader.get_field("general.architecture")
            if field is None:
                raise ValueError("it names no architecture")
            architecture = str(field.contents())
            scaling = reader.get_field(f"{architecture}.rope.scaling.type")
            theta = reader.get_field(f"{architecture}.rope.freq_base")
            scaled = scaling is not None and scaling.contents() != "none"
            # As Llama 3.1 has them. transformers reads neither, so the model would be another at a long context.
            if scaled or any(tensor.name == "rope_freqs.weight" for tensor in reader.tensors):
                raise ValueError("its RoPE is scaled, which transformers does not read from GGUF; use the original")
        if _GGUF_NAMES.get(architecture, architecture) not in FAMILIES:
            raise FamilyError(f"{self.path}: architecture {architecture!r}: can be grown are {', '.join(FAMILIES)}")
        return None if theta is None else float(theta.contents())

    @contextmanager
    def _said(self) -> Iterator[None]:
        """What transformers and gguf say of a file that they cannot read, as a sentence."""
        try:
            yield
        except Exception as error:  # of any class: neither library says what a file that is not as it thought will do
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise SourceError(f"{self.path}: cannot be read as GGUF: {reason}") from None
