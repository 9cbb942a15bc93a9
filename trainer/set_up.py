"""Make the environment in which the trainer runs on a host, or say what an existing one lacks.

    python -m trainer.set_up --root FOLDER --requirement torch==2.13.0 --requirement numpy==2.4.6 ...
    python -m trainer.set_up --check PYTHON

The first makes a virtual environment in FOLDER/env and installs what is required, which whoever asks must say; it tells
its progress as it goes, and may be run again to complete what was cut short. Nothing is touched outside FOLDER, and no
more rights are needed than to write there. The last line is `KANGAROO-ENV` and what :func:`look` found in it, as JSON;
where something failed, it is a sentence about what to do. The second prints that JSON alone for any interpreter. Both
exit with 0 if everything can be imported, else with 1.

Standard library only. It runs under any Python from 3.9; the trainer itself wants a newer one, which is looked for.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trainer import machine

#: What the trainer imports, by the names under which it is installed.
NEEDED = ("torch", "transformers", "tokenizers", "datasets", "safetensors", "pydantic", "numpy", "filelock", "tqdm")
#: The Pythons that all of that is made for.
OLDEST, NEWEST = (3, 11), (3, 13)
_RANGE = "Python {}.{} to {}.{}".format(*OLDEST, *NEWEST)
#: Bytes: with less room than this an installation that failed has failed for want of room.
_LITTLE = 200 << 20


class SetUpError(Exception):
    """The environment cannot be made; the message says why and what to do."""


def set_up(root: Path, requirements: list[str], torch_index: str = "", system: bool = False) -> dict[str, Any]:
    """Make, or complete, the environment below `root`; what :func:`look` finds in it.

    With `system` it sees the packages of the Python it is made with, and a torch among them is kept as it is. Raises
    :class:`SetUpError`.
    """
    env = root / "env"
    python = env / "bin" / "python"
    scratch = root / "tmp"  # /tmp may be small, and a home directory short of room for a cache
    scratch.mkdir(parents=True, exist_ok=True, mode=0o700)
    os.environ.update(TMPDIR=str(scratch), PIP_CACHE_DIR=str(scratch / "pip"), UV_CACHE_DIR=str(scratch / "uv"))
    _say(f"1 of 3: the virtual environment {env}")
    base = _interpreter(env)
    if not _is_made(env, system):
        _make(env, base, system)
    _say(f"2 of 3: packages ({', '.join(requirements)})")
    names = [_name(requirement) for requirement in requirements]
    if kept := _torch_of_the_system(env) if system else "":
        _say(f"torch {kept} is there already and is kept")
        requirements = [required for required in requirements if _name(required) != "torch"]
    _install(python, base, requirements, torch_index)
    _say("3 of 3: a look at what can be imported")
    found = look(str(python), names)
    if found["missing"]:
        raise SetUpError("These cannot be imported: " + "; ".join(f"{name}: {why}" for name, why in _whys(found)))
    shutil.rmtree(scratch, ignore_errors=True)
    gpus = machine.readings(root)["gpus"]
    if gpus and found["versions"].get("torch") and not found["cuda_available"]:
        made_for = f"CUDA {found['cuda']}" if found["cuda"] else "CPUs alone"
        found["warning"] = (
            f"torch {found['versions']['torch']} (made for {made_for}) "
            "cannot use the GPUs here. Update their driver, or name a Python whose torch is made for it."
        )
    return found


# A look ---------------------------------------------------------------------------------------------------------------

_IMPORT = """
import importlib, json, sys
from importlib import metadata
def tell(**known): print("KANGAROO " + json.dumps(known), flush=True)
tell(python=list(sys.version_info[:3]), executable=sys.executable)
for name in sys.argv[1:]:
    tell(begun=name)
    try:
        module = importlib.import_module(name.replace("-", "_"))
        try: version = metadata.version(name)
        except metadata.PackageNotFoundError: version = str(getattr(module, "__version__", "unknown"))
        tell(name=name, version=version, problem="")
        if name == "torch":
            tell(cuda=module.version.cuda, cuda_available=module.cuda.is_available())
    except ModuleNotFoundError as error:
        tell(name=name, version=None, problem="it is not installed" if error.name == name else str(error))
    except BaseException as error:
        tell(name=name, version=None, problem=f"{type(error).__name__}: {error}"[:300])
"""


def look(python: str, names: Iterable[str] = NEEDED) -> dict[str, Any]:
    """What an interpreter has of `names`, tried by importing all of it.

    Returns executable, python (its version), versions ({name: version or None}), missing (names), problems ({name:
    words}), cuda, cuda_available, problem ("", or why the interpreter itself will not do), and warning ("", or what
    :func:`set_up` has to say of an environment that can be used all the same).
    """
    names = list(names)
    found: dict[str, Any] = {"executable": python, "python": None, "versions": dict.fromkeys(names), "problems": {}}
    found.update(cuda=None, cuda_available=False, problem="", warning="")
    begun, why = "", "it ended while this was imported"
    try:
        run = subprocess.run(
            [python, "-c", _IMPORT, *names],
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=600,
            check=False,
        )
        said = run.stdout
    except subprocess.TimeoutExpired as late:
        said, why = late.stdout or b"", "it took more than ten minutes to import"
    except OSError as error:
        said, found["problem"] = b"", f"{python} cannot be run: {error.strerror}."
    for line in said.decode("utf-8", "replace").splitlines():
        if not line.startswith("KANGAROO "):
            continue
        told = json.loads(line.partition(" ")[2])
        begun = told.get("begun", begun)
        if "python" in told:
            found.update(executable=told["executable"], python=".".join(map(str, told["python"])))
            if not OLDEST <= tuple(told["python"][:2]) <= NEWEST:
                found["problem"] = f"{python} is Python {found['python']}; the trainer wants {_RANGE}."
        elif "name" in told:
            found["versions"][told["name"]] = told["version"]
            found["problems"][told["name"]] = told["problem"]
        elif "cuda" in told:
            found.update(told)
    if begun and begun not in found["problems"]:
        found["problems"][begun] = why
    found["missing"] = [name for name in names if found["versions"][name] is None]
    found["problems"] = {name: problem for name, problem in found["problems"].items() if problem}
    if found["python"] is None and not found["problem"]:
        found["problem"] = f"{python} is no working Python."
    return found


def _whys(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, found["problems"].get(name, "it was not reached")) for name in found["missing"]]


# Steps ----------------------------------------------------------------------------------------------------------------


def _interpreter(env: Path) -> str:
    """A Python that the environment can be made with, and not itself out of it."""
    own = sys.executable
    if Path(sys.prefix).resolve() == env.resolve():
        own = getattr(sys, "_base_executable", own)
    names = [f"python3.{minor}" for minor in range(NEWEST[1], OLDEST[1] - 1, -1)]
    for candidate in (own, *filter(None, map(shutil.which, names))):
        version = _output(candidate, "-c", "import sys; print(*sys.version_info[:2])").split()
        if len(version) == 2 and OLDEST <= (int(version[0]), int(version[1])) <= NEWEST:
            return candidate
    raise SetUpError(
        f"There is no {_RANGE} on this machine that could be found; {own} is {sys.version.split()[0]}. Install one, "
        "which needs no rights with uv (`uv python install 3.12`) or conda, and name it as the Python to use."
    )


def _is_made(env: Path, system: bool) -> bool:
    try:
        settings = (env / "pyvenv.cfg").read_text()
    except OSError:
        return False
    sees = bool(re.search(r"include-system-site-packages\s*=\s*true", settings))
    return sees == system and _output(str(env / "bin" / "python"), "-c", "print('works')") == "works"


def _make(env: Path, base: str, system: bool) -> None:
    command = [base, "-m", "venv", *(["--system-site-packages"] if system else [])]
    if _run([*command, str(env)])[0] == 0:
        return
    # Debian and Ubuntu keep ensurepip, without which there is no pip in it, in a package of its own.
    code, said = _run([*command, "--without-pip", str(env)])
    if code:
        raise SetUpError(_without_room(env) or f"A virtual environment could not be made in {env}: {_last(said)}")
    if _pip(env / "bin" / "python", base) is None:
        version = _output(base, "-c", "import sys; print('%d.%d' % sys.version_info[:2])")
        raise SetUpError(
            f"python3-venv is missing: {base} cannot put pip into a virtual environment. Ask for it to be installed "
            f"(`apt install python{version}-venv`), or install uv (https://docs.astral.sh/uv/) or conda for yourself, "
            "which needs no rights, and set up again; conda's Python is named as the Python to use."
        )


def _pip(python: Path, base: str) -> list[str] | None:
    """A command that installs into the environment of `python`."""
    if _output(str(python), "-m", "pip", "--version"):
        return [str(python), "-m", "pip", "install", "--progress-bar", "off"]
    if uv := shutil.which("uv"):
        return [uv, "pip", "install", "--python", str(python), "--no-progress"]
    if _output(base, "-m", "pip", "--python", str(python), "--version"):
        return [base, "-m", "pip", "--python", str(python), "install", "--progress-bar", "off"]
    return None


def _torch_of_the_system(env: Path) -> str:
    """The version of a torch that the environment sees and that is not in it; "" if there is none."""
    code = "import torch; print(torch.__version__, torch.__file__)"
    version, _, path = _output(str(env / "bin" / "python"), "-c", code).partition(" ")
    return version if path and env.resolve() not in Path(path).resolve().parents else ""


def _install(python: Path, base: str, requirements: list[str], torch_index: str) -> None:
    command = _pip(python, base)
    if command is None:
        raise SetUpError(f"There is no pip in {python.parent.parent}. Delete that folder and set up again.")
    if torch_index:  # its builds, as in 2.13.0+cu128, come before those without a name
        command += ["--extra-index-url", torch_index]
    code, said = _run([*command, *requirements])
    if code == 0:
        return
    if room := _without_room(python.parent) or _without_room(Path(os.environ["TMPDIR"])):
        raise SetUpError(room)
    if re.search(r"No space left on device|Disk quota exceeded", said):
        raise SetUpError(f"The disk is full, or your share of it: {_last(said)}")
    if re.search(r"Connection|name resolution|timed out|Network is unreachable|error sending request|SSLError", said):
        raise SetUpError(
            "This machine does not reach the package index. Lines to run before may set a proxy (`export https_proxy="
            "...`) or another index (`export PIP_INDEX_URL=...`); or name a Python that has all packages already."
        )
    raise SetUpError(f"The packages could not be installed: {_last(said)}")


def _without_room(folder: Path) -> str:
    folder = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(folder).free
    if free >= _LITTLE:
        return ""
    return f"The disk of {folder} is full: {free >> 20} MB are left. torch with CUDA takes about 8 GB; make room."


def _name(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9_.-]", requirement.strip(), maxsplit=1)[0].lower()


# Other programs -------------------------------------------------------------------------------------------------------


def _run(command: list[str]) -> tuple[int, str]:
    """Run a command and show what it says as it goes; its code, and its last words."""
    _say("$ " + " ".join(command))
    # Paths into other environments would lead it astray.
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "PIP_USER")}
    env.update(PYTHONUNBUFFERED="1", PIP_NO_INPUT="1", PIP_DISABLE_PIP_VERSION_CHECK="1")
    last: list[str] = []
    with subprocess.Popen(
        command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            text = line.decode("utf-8", "replace").rstrip()
            _say(text)
            last = [*last[-50:], text]
    return process.returncode, "\n".join(last)


def _output(*command: str) -> str:
    try:
        run = subprocess.run(command, cwd="/", capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    except OSError:
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""


def _last(said: str) -> str:
    """The line that matters, of what pip or venv said at the end."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(ERROR|error|Error|×)", line)]
    return (errors or lines or ["it said nothing"])[-1][:300]


def _say(text: str) -> None:
    print(text, flush=True)


# Command line ---------------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="trainer set_up", description=(__doc__ or "").split("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--root", type=Path, metavar="FOLDER", help="make FOLDER/env")
    what.add_argument("--check", metavar="PYTHON", help="say what this interpreter has")
    parser.add_argument("--requirement", action="append", default=[], metavar="NAME==VERSION")
    parser.add_argument("--torch-index", default="", metavar="URL", help="a package index beside the usual one")
    parser.add_argument("--system-site-packages", action="store_true", help="take what the Python here has already")
    given = parser.parse_args(arguments)
    names = [_name(requirement) for requirement in given.requirement] or NEEDED
    if given.check:
        # Not resolved: the Python of a virtual environment is a link, and another one at its other end.
        python = os.path.abspath(os.path.expanduser(given.check)) if os.sep in given.check else given.check
        found = look(python, names)
        _say(json.dumps(found))
        return 1 if found["missing"] or found["problem"] else 0
    if not given.requirement:
        parser.error("--root wants at least one --requirement")
    root = given.root.expanduser().resolve()
    try:
        found = set_up(root, given.requirement, given.torch_index, given.system_site_packages)
    except SetUpError as error:
        _say(str(error))
        return 1
    except OSError as error:
        _say(f"{error.filename or root}: {error.strerror or error}.")
        return 1
    _say("KANGAROO-ENV " + json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
