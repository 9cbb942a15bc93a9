"""Set-up in real virtual environments: of a package of the index, and of small ones made here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

from trainer import agent, set_up

pytestmark = pytest.mark.xdist_group("set_up")  # a disk does not like two of these at once


#: As far as anybody looks.
TORCH = """
__version__ = "2.7.1+cu126"
class version:
    cuda = "12.6"
class cuda:
    is_available = staticmethod(lambda: True)
"""


def run(*arguments: str, python: str = sys.executable, **env: str) -> tuple[int, list[str]]:
    """Exit code and lines of the program."""
    command = [python, "-m", "trainer.set_up", *arguments]
    told = subprocess.run(
        command, cwd=agent.ROOT, env={**os.environ, **env}, capture_output=True, text=True, check=False
    )
    assert "Traceback" not in told.stderr, told.stderr
    return told.returncode, told.stdout.splitlines()


def environment(lines: list[str]) -> dict[str, Any]:
    assert lines[-1].startswith("KANGAROO-ENV "), lines[-5:]
    return json.loads(lines[-1].partition(" ")[2])  # type: ignore[no-any-return]


@pytest.fixture
def index(tmp_path: Path) -> Any:
    """A folder of small packages, and the variables to install from it alone."""

    class Index:
        env = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path / "index"), "PIP_CONFIG_FILE": os.devnull}

        def add(self, name: str, version: str = "1.0", code: str = "") -> None:
            (tmp_path / "index").mkdir(exist_ok=True)
            info = f"{name}-{version}.dist-info"
            files = {
                f"{name}.py": code or f"__version__ = {version!r}\n",
                f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
                f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            }
            files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
            with zipfile.ZipFile(tmp_path / "index" / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
                for path, text in files.items():
                    wheel.writestr(path, text)

    return Index()


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with nothing in it."""
    folder = tmp_path_factory.mktemp("empty") / "env"
    venv.create(folder, with_pip=True)
    return folder


@pytest.fixture
def made(empty: Path, tmp_path: Path) -> Path:
    """The working folder of a host whose environment was made before: to make one takes two seconds."""
    root = tmp_path / "kangaroo"
    shutil.copytree(empty, root / "env", symlinks=True)
    return root


def test_what_is_needed_is_what_the_project_pins() -> None:
    project = tomllib.loads((agent.ROOT / "pyproject.toml").read_text())["project"]
    pinned = {set_up._name(requirement) for requirement in project["dependencies"]}
    assert set(set_up.NEEDED) <= pinned
    oldest, newest = set_up.OLDEST, set_up.NEWEST
    assert project["requires-python"] == f">={oldest[0]}.{oldest[1]},<{newest[0]}.{newest[1] + 1}"


def test_a_package_of_the_index_is_installed_and_seen(tmp_path: Path) -> None:
    root = tmp_path / "with spaces" / "kangaroo"
    code, lines = run("--root", str(root), "--requirement", "filelock")
    if code and ("package index" in lines[-1] or "No matching distribution" in lines[-1]):
        pytest.skip(f"no package index answers here: {lines[-1]}")
    found = environment(lines)
    assert code == 0
    assert found["missing"] == []
    assert found["versions"]["filelock"]
    assert Path(found["executable"]) == root / "env" / "bin" / "python"
    assert not (root / "tmp").exists(), "nothing is left behind"


def test_set_up_again_completes_what_is_missing(tmp_path: Path, index: Any) -> None:
    index.add("torch", "2.13.0", TORCH)
    index.add("tqdm")
    asked = ("--root", str(tmp_path / "kangaroo"), "--requirement", "torch==2.13.0")
    code, lines = run(*asked, **index.env)
    assert (code, environment(lines)["versions"]) == (0, {"torch": "2.13.0"})
    assert [line for line in lines if " of 3: " in line] == [line for line in lines if line[:2] in ("1 ", "2 ", "3 ")]
    marker = tmp_path / "kangaroo" / "env" / "marker"
    marker.touch()
    code, lines = run(*asked, "--requirement", "tqdm>=1.0", **index.env)
    assert (code, environment(lines)["versions"]) == (0, {"torch": "2.13.0", "tqdm": "1.0"})
    assert marker.exists(), "the environment was not made anew"


def test_a_half_made_environment_is_made_whole(tmp_path: Path, index: Any) -> None:
    index.add("tqdm")
    (tmp_path / "kangaroo" / "env" / "bin").mkdir(parents=True)
    (tmp_path / "kangaroo" / "env" / "pyvenv.cfg").write_text("home = /usr/bin\n")
    code, lines = run("--root", str(tmp_path / "kangaroo"), "--requirement", "tqdm", **index.env)
    assert (code, environment(lines)["missing"]) == (0, [])


def test_a_torch_that_is_there_is_kept(tmp_path: Path, index: Any) -> None:
    """The Python of the tests has one, which a made environment does not see; so a Python of our own has to."""
    index.add("torch", "2.13.0")
    index.add("tqdm")
    site = tmp_path / "site"
    site.mkdir()
    (site / "torch.py").write_text(TORCH)
    root = tmp_path / "kangaroo"
    asked = ("--root", str(root), "--requirement", "torch==2.13.0", "--requirement", "tqdm")
    run("--root", str(root), "--requirement", "tqdm", "--system-site-packages", **index.env)
    [packages] = (root / "env" / "lib").glob("python*/site-packages")
    (packages / "outside.pth").write_text(f"{site}\n")
    code, lines = run(*asked, "--system-site-packages", **index.env)
    found = environment(lines)
    assert code == 0
    assert any("torch 2.7.1+cu126 is there already" in line for line in lines)
    assert (found["versions"]["torch"], found["cuda"], found["cuda_available"]) == ("2.7.1+cu126", "12.6", True)


def test_a_torch_that_does_not_see_the_gpus_is_told(tmp_path: Path, made: Path, index: Any) -> None:
    index.add("torch", "2.13.0", TORCH.replace("True", "False"))
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text("#!/bin/sh\necho 0, GPU-1, Tesla V100, 32768, 0, 0, 30, 40.0, 300.0, 470.1\n")
    smi.chmod(0o755)
    path = f"{smi.parent}:{os.environ['PATH']}"
    code, lines = run("--root", str(made), "--requirement", "torch", **index.env, PATH=path)
    assert code == 0, "it can be imported"
    assert environment(lines)["warning"].startswith("torch 2.13.0 (made for CUDA 12.6) cannot use the GPUs here")


def test_what_cannot_be_imported_fails_set_up_with_its_words(made: Path, index: Any) -> None:
    index.add("datasets", code="raise OSError('libarrow.so: cannot open shared object file')\n")
    code, lines = run("--root", str(made), "--requirement", "datasets", **index.env)
    assert code == 1
    assert lines[-1].startswith("These cannot be imported: datasets: OSError: libarrow.so")


def test_a_requirement_that_does_not_exist_is_told(made: Path, index: Any) -> None:
    index.add("tqdm")
    code, lines = run("--root", str(made), "--requirement", "tqdm==9", **index.env)
    assert code == 1
    assert "No matching distribution found for tqdm==9" in lines[-1]


def test_a_machine_without_network_is_told_what_to_do(made: Path, index: Any) -> None:
    env = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "1"}
    env.update(PIP_NO_INDEX="0", PIP_FIND_LINKS="", PIP_EXTRA_INDEX_URL="", PIP_CONSTRAINT="", https_proxy="")
    code, lines = run("--root", str(made), "--requirement", "tqdm", **env)
    assert code == 1
    assert lines[-1].startswith("This machine does not reach the package index.")


@pytest.mark.parametrize("pip", [True, False])
def test_where_ensurepip_is_missing_another_pip_serves_or_the_package_is_named(
    tmp_path: Path, index: Any, pip: bool
) -> None:
    index.add("tqdm")
    program = tmp_path / "python3"  # as on Debian without python3-venv
    program.write_text(f"""#!/bin/sh
case "$*" in
  *--without-pip*) ;;
  "-m venv"*) echo "The virtual environment was not created successfully because ensurepip is not available."; exit 1;;
  "-m pip"*) {":" if pip else "exit 1"};;
esac
exec {sys.executable} "$@"
""")
    program.chmod(0o755)
    code = "import sys; from trainer import set_up; set_up.shutil.which = lambda name: None\n"
    code += "sys.executable = sys.argv[1]\n"
    code += "sys.exit(set_up.main(['--root', sys.argv[2], '--requirement', 'tqdm']))"
    command = [sys.executable, "-c", code, str(program), str(tmp_path / "kangaroo")]
    env = {**os.environ, **index.env}
    told = subprocess.run(command, cwd=agent.ROOT, env=env, capture_output=True, text=True, check=False)
    last = told.stdout.splitlines()[-1]
    assert told.returncode == (0 if pip else 1)
    if pip:
        assert environment([last])["versions"] == {"tqdm": "1.0"}
    else:
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        assert last.startswith("python3-venv is missing")
        assert f"apt install python{version}-venv" in last


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(set_up, "_LITTLE", 1 << 60)
    assert "is full" in set_up._without_room(tmp_path / "not" / "there")


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, lines = run("--root", str(tmp_path / "file" / "kangaroo"), "--requirement", "tqdm")
    assert code == 1
    assert lines[-1].endswith("Not a directory.")


# A look at an environment that is there -------------------------------------------------------------------------------


def test_an_environment_with_everything_is_enough() -> None:
    code, lines = run("--check", sys.executable)
    found = json.loads(lines[-1])
    assert (code, found["missing"], found["problem"], found["problems"]) == (0, [], "", {})
    assert set(found["versions"]) == set(set_up.NEEDED)
    assert all(found["versions"].values())
    assert found["cuda_available"] in (True, False)


def test_what_an_environment_lacks_is_listed(tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\necho noise\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    code, lines = run("--check", str(bare))
    found = json.loads(lines[-1])
    assert code == 1
    assert found["missing"] == list(set_up.NEEDED)
    assert found["problems"]["torch"] == "it is not installed"


@pytest.mark.parametrize(
    ("script", "problem"),
    [(None, "cannot be run: No such file or directory."), ("echo hello", "is no working Python.")],
)
def test_what_is_no_python_is_told(tmp_path: Path, script: str | None, problem: str) -> None:
    path = tmp_path / "python"
    if script:
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    code, lines = run("--check", str(path))
    assert code == 1
    assert json.loads(lines[-1])["problem"] == f"{path} {problem}"


def test_an_import_that_kills_its_process_is_told(tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (site / "torch.py").write_text("import os; os.kill(os.getpid(), 11)")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={site} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    found = set_up.look(str(python), ["filelock", "torch", "tqdm"])
    assert found["missing"] == ["torch", "tqdm"]
    assert found["problems"] == {"torch": "it ended while this was imported"}


def old_python() -> str:
    found = sorted(Path.home().glob(".pyenv/versions/3.9.*/bin/python"))
    return str(found[0]) if found else ""


@pytest.mark.skipif(not old_python(), reason="there is no Python 3.9 here")
def test_an_old_python_looks_for_a_newer_one(tmp_path: Path, index: Any) -> None:
    index.add("tqdm")
    folder = tmp_path / "bin"
    folder.mkdir()
    newer = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    (folder / newer).symlink_to(sys._base_executable)  # type: ignore[attr-defined]
    asked = ("--root", str(tmp_path / "kangaroo"), "--requirement", "tqdm")
    code, lines = run(*asked, python=old_python(), **index.env, PATH=f"{folder}:/nowhere")
    assert code == 0, lines[-1]
    assert environment(lines)["python"].startswith(newer.removeprefix("python"))
    code, lines = run(*asked, python=old_python(), **index.env, PATH="/nowhere")
    assert code == 1
    assert lines[-1].startswith("There is no Python 3.11 to 3.13 on this machine")
    assert json.loads(run("--check", old_python())[1][-1])["problem"].endswith("the trainer wants Python 3.11 to 3.13.")
