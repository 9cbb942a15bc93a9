"""What a machine says of itself; its GPUs in the words of `nvidia-smi` as they were seen on such machines."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from trainer import agent, machine

MIB = 1 << 20

#: Two H100s; on the first somebody trains.
H100 = """\
0, GPU-4f1b6a0e-0c1c-8a55-9d5e-1f0a5b7d2c31, NVIDIA H100 80GB HBM3, 81559, 61234, 97, 62, 643.87, 700.00, 570.195.03
1, GPU-9a3c77d2-52be-6e0f-3b7e-6a0e0c9d8f12, NVIDIA H100 80GB HBM3, 81559, 4, 0, 31, 70.21, 700.00, 570.195.03
"""
H100_PROCESSES = """\
GPU-4f1b6a0e-0c1c-8a55-9d5e-1f0a5b7d2c31, 953998
GPU-4f1b6a0e-0c1c-8a55-9d5e-1f0a5b7d2c31, 954120
GPU-4f1b6a0e-0c1c-8a55-9d5e-1f0a5b7d2c31, [N/A]
"""
#: A small consumer card that does not know its power, with a desktop on it.
GTX_1050 = "0, GPU-0c7d3f5e-9a4b, NVIDIA GeForce GTX 1050 Ti, 4096, 187, 3, 54, [N/A], [N/A], 535.183.01\n"
#: Of the time before the brackets were [N/A].
OLD = "0, GPU-1, GeForce GT 710, 2002, 0, [Not Supported], 41, [Unknown Error], [Not Supported], 390.157\n"
#: A GPU that shares the memory of the machine.
GB10 = "0, GPU-7e2f, NVIDIA GB10, [N/A], [N/A], 0, 39, 3.74, [N/A], 580.126.09\n"
#: The first of two A100s is divided.
MIG = (
    "0, GPU-63feeb45-94c6-b9cb-78ea-98e9b7a5be6b, NVIDIA A100-SXM4-40GB, 40960, [Insufficient Permissions], [N/A], 35, "
    "52.11, 400.00, 550.54.15\n"
    "1, GPU-5c89852c-d268-c3f3-1b07-005d5ae1dc3f, NVIDIA A100-SXM4-40GB, 40960, 0, 0, 33, 50.87, 400.00, 550.54.15\n"
)
MIG_LISTING = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-63feeb45-94c6-b9cb-78ea-98e9b7a5be6b)
  MIG 3g.20gb     Device  0: (UUID: MIG-b7d4f3a2-6a1e-5f0c-9b1d-2f6c8e0a4d17)
  MIG 1g.5gb+me   Device  1: (UUID: MIG-0e5a9c61-3d2b-5b7f-8c44-71f0d6b2e938)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-5c89852c-d268-c3f3-1b07-005d5ae1dc3f)
"""
OLD_MIG_LISTING = """\
GPU 0: A100-SXM4-40GB (UUID: GPU-63feeb45-94c6-b9cb-78ea-98e9b7a5be6b)
  MIG 3g.20gb Device 0: (UUID: MIG-GPU-63feeb45-94c6-b9cb-78ea-98e9b7a5be6b/1/0)
"""
MISMATCH = "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 580.173\n"
NO_DRIVER = (
    "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest NVIDIA "
    "driver is installed and running.\n\n"
)
LOST = "Unable to determine the device handle for GPU1: 0000:34:00.0: Unknown Error\n"


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put an `nvidia-smi` first in the PATH that says what was recorded."""
    monkeypatch.setattr(machine, "_libraries", lambda python: {})

    def say(query: str, processes: str = "", listing: str = "", code: int = 0, before: str = "") -> None:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        for name, text in (("query", query), ("processes", processes), ("listing", listing)):
            (folder / name).write_text(text)
        program = f"""#!/bin/sh
{before}
case "$*" in
  --query-gpu={machine._QUERY}*) cat {folder}/query; exit {code};;
  --query-compute-apps=gpu_uuid,pid*) cat {folder}/processes;;
  -L) cat {folder}/listing;;
  *) echo "unexpected: $*"; exit 9;;
esac
"""
        (folder / "nvidia-smi").write_text(program)
        (folder / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    return say


def test_gpus_are_told_with_what_they_do(smi: Any) -> None:
    smi(H100, H100_PROCESSES)
    said = machine.readings()
    assert said["gpu_problem"] == ""
    assert said["gpus"][0] == {
        "index": 0,
        "uuid": "GPU-4f1b6a0e-0c1c-8a55-9d5e-1f0a5b7d2c31",
        "name": "NVIDIA H100 80GB HBM3",
        "memory_bytes": 81559 * MIB,
        "memory_used_bytes": 61234 * MIB,
        "use": 0.97,
        "temperature": 62.0,
        "power": 643.87,
        "power_limit": 700.0,
        "processes": [953998, 954120],
    }
    assert machine.free_gpus(said["gpus"]) == ["GPU-9a3c77d2-52be-6e0f-3b7e-6a0e0c9d8f12"]
    assert machine.facts()["driver"] == "570.195.03"


def test_what_a_gpu_does_not_know_is_none(smi: Any) -> None:
    smi(GTX_1050)
    [gpu] = machine.readings()["gpus"]
    assert (gpu["power"], gpu["power_limit"], gpu["use"], gpu["temperature"]) == (None, None, 0.03, 54.0)
    assert machine.free_gpus([gpu]) == [gpu["uuid"]], "a desktop takes less than 5 %"
    smi(OLD)
    [gpu] = machine.readings()["gpus"]
    assert (gpu["power"], gpu["power_limit"], gpu["use"], gpu["temperature"]) == (None, None, None, 41.0)


def test_a_gpu_without_memory_of_its_own_has_the_machines(smi: Any) -> None:
    smi(GB10)
    said = machine.facts()
    assert said["gpus"][0]["memory_bytes"] == said["memory_bytes"]
    assert machine.free_gpus(said["gpus"]) == ["GPU-7e2f"]


def test_a_divided_gpu_is_told_by_its_parts(smi: Any) -> None:
    smi(MIG, listing=MIG_LISTING)
    gpus = machine.readings()["gpus"]
    assert [(gpu["index"], gpu["name"], gpu["memory_bytes"] // MIB) for gpu in gpus] == [
        (0, "NVIDIA A100-SXM4-40GB MIG 3g.20gb", 20480),
        (0, "NVIDIA A100-SXM4-40GB MIG 1g.5gb+me", 5120),
        (1, "NVIDIA A100-SXM4-40GB", 40960),
    ]
    assert machine.free_gpus(gpus) == [
        "MIG-b7d4f3a2-6a1e-5f0c-9b1d-2f6c8e0a4d17",
        "MIG-0e5a9c61-3d2b-5b7f-8c44-71f0d6b2e938",
        "GPU-5c89852c-d268-c3f3-1b07-005d5ae1dc3f",
    ]
    smi(MIG, "GPU-63feeb45-94c6-b9cb-78ea-98e9b7a5be6b, 77\n", OLD_MIG_LISTING)
    gpus = machine.readings()["gpus"]
    assert [gpu["uuid"] for gpu in gpus] == [
        "MIG-GPU-63feeb45-94c6-b9cb-78ea-98e9b7a5be6b/1/0",
        "GPU-5c89852c-d268-c3f3-1b07-005d5ae1dc3f",
    ]
    assert machine.free_gpus(gpus) == ["GPU-5c89852c-d268-c3f3-1b07-005d5ae1dc3f"], "nobody knows which part it is on"


@pytest.mark.parametrize(
    ("said", "code", "problem"),
    [
        (MISMATCH, 18, "Failed to initialize NVML: Driver/library version mismatch"),
        (NO_DRIVER, 9, "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that "),
        ("No devices were found\n", 6, "No devices were found"),
        ("\x1b[31mred\x1b[0m\x07\n", 1, "[31mred[0m"),
        ("", 77, "nvidia-smi ended with code 77."),
        ("", 0, "nvidia-smi lists no GPU."),
    ],
)
def test_a_driver_in_trouble_is_told_in_its_own_words(smi: Any, said: str, code: int, problem: str) -> None:
    smi(said, code=code)
    for answer in (machine.readings(), machine.facts()):
        assert answer["gpus"] == []
        assert answer["gpu_problem"].startswith(problem)


def test_one_lost_gpu_does_not_hide_the_other(smi: Any) -> None:
    smi(LOST + H100.splitlines(keepends=True)[0], code=15)
    said = machine.readings()
    assert [gpu["index"] for gpu in said["gpus"]] == [0]
    assert said["gpu_problem"] == LOST.strip()


def test_an_nvidia_smi_that_hangs_is_not_waited_for(smi: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_SMI_TIMEOUT", 0.5)
    smi(H100, before="exec sleep 600")
    said = machine.readings()
    assert said["gpus"] == []
    assert "no answer" in said["gpu_problem"]


def test_a_machine_without_nvidia_smi_has_no_gpu_and_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_smi", lambda: None)
    said = machine.readings()
    assert said["gpus"] == []
    assert said["gpu_problem"] == "" or Path("/proc/driver/nvidia/version").exists()


@pytest.mark.parametrize(
    ("used", "memory", "processes", "free"),
    [
        (4, 81559, [], True),
        (4, 81559, [1], False),
        (1023, 81559, [], True),
        (1024, 81559, [], False),
        (409, 8192, [], True),
        (410, 8192, [], False),
    ],
)
def test_a_gpu_is_free_if_nobody_computes_on_it(used: int, memory: int, processes: list[int], free: bool) -> None:
    gpu = {"uuid": "GPU-1", "memory_bytes": memory * MIB, "memory_used_bytes": used * MIB, "processes": processes}
    assert machine.free_gpus([gpu]) == (["GPU-1"] if free else [])


# The machine ----------------------------------------------------------------------------------------------------------


def test_a_machine_says_what_it_is(tmp_path: Path) -> None:
    said = machine.facts(tmp_path / "not" / "there" / "yet")
    assert said["cores"] == agent.cores()
    assert 0 < said["disk_free_bytes"] <= said["disk_total_bytes"]
    assert said["executable"] == sys.executable
    assert said["torch"]["version"]
    assert said["torch"]["cuda_available"] in (True, False)
    assert said["transformers"]
    assert all(isinstance(said[name], str) for name in ("hostname", "system", "machine", "cpu", "linger_remedy"))
    now = machine.readings(tmp_path)
    assert 0 < now["memory_free_bytes"] <= said["memory_bytes"]
    assert abs(now["time"] - time.time()) < 60


def test_a_python_without_torch_is_told_as_such(tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\necho noise\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    assert machine.facts(python=str(bare))["torch"] is None
    assert machine.facts(python="/nowhere/python")["torch"] is None


def test_a_torch_that_cannot_be_imported_is_told_with_its_words(tmp_path: Path) -> None:
    site = tmp_path / "site"
    (site / "torch-9.9.dist-info").mkdir(parents=True)
    (site / "torch-9.9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.9\n")
    (site / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={site} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    assert machine.facts(python=str(python))["torch"] == {
        "version": "9.9",
        "cuda": None,
        "cuda_available": False,
        "problem": "ImportError: libcudart.so.13: cannot open shared object file",
    }


def test_it_needs_nothing_but_the_standard_library() -> None:
    code = "import trainer.machine, trainer.relay, trainer.wire, trainer.set_up"
    subprocess.run([sys.executable, "-S", "-c", code], check=True, cwd=agent.ROOT)


# A logout -------------------------------------------------------------------------------------------------------------


def systemd(root: Path, **files: str) -> Path:
    """A file system on which systemd runs, with files of logind's by their path, "__" for "/"."""
    (root / "run/systemd/system").mkdir(parents=True)
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_conf", ".conf").replace("_d/", ".d/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_without_systemd_processes_outlive_a_logout(tmp_path: Path) -> None:
    assert machine.kills_at_logout(tmp_path) is False


@pytest.fixture
def ada(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else than root, whose processes logind spares."""
    monkeypatch.setattr(machine, "user", lambda: "ada")


@pytest.mark.usefixtures("ada")
def test_what_logind_was_built_with_stands_in_its_comments(tmp_path: Path) -> None:
    built = "[Login]\n#NAutoVTs=6\n#KillUserProcesses=no\n#KillExcludeUsers=root\n"
    assert machine.kills_at_logout(systemd(tmp_path / "1", etc__systemd__logind_conf=built)) is False
    assert machine.kills_at_logout(systemd(tmp_path / "2")) is None


@pytest.mark.usefixtures("ada")
def test_a_setting_of_the_administrators_counts_and_the_last_one_most(tmp_path: Path) -> None:
    built = "[Login]\n#KillUserProcesses=no\n"
    kills, spares = "[Login]\nKillUserProcesses=yes\n", "[Login]\nKillUserProcesses = no\n"

    def asked(name: str, **files: str) -> bool | None:
        return machine.kills_at_logout(systemd(tmp_path / name, **files))

    assert asked("main", etc__systemd__logind_conf=kills) is True
    assert asked("usr", usr__lib__systemd__logind_conf=built, usr__lib__systemd__logind_conf_d__a_conf=kills) is True
    assert asked("last", etc__systemd__logind_conf_d__a_conf=kills, etc__systemd__logind_conf_d__b_conf=spares) is False
    masked = {"usr__lib__systemd__logind_conf_d__a_conf": kills, "etc__systemd__logind_conf_d__a_conf": spares}
    assert asked("masked", **masked) is False
    assert asked("spared", etc__systemd__logind_conf=kills + "KillExcludeUsers=root ada\n") is False
    assert asked("meant", etc__systemd__logind_conf=kills + "KillOnlyUsers=ada bob\n") is True
    assert asked("others", etc__systemd__logind_conf=kills + "KillOnlyUsers=bob\n") is False


def test_where_a_logout_ends_processes_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "kills_at_logout", lambda: True)
    monkeypatch.setattr(machine, "_lingers", lambda: False)
    said = machine.facts()
    assert said["lingers"] is False
    assert "loginctl enable-linger" in said["linger_remedy"]
    assert machine.launcher() == []


def test_a_user_who_lingers_is_served_by_their_service_manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "kills_at_logout", lambda: True)
    monkeypatch.setattr(machine, "_lingers", lambda: True)
    program = tmp_path / "systemd-run"
    program.write_text('#!/bin/sh\nwhile [ "${1#--}" != "$1" ]; do shift; done\nexec "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert machine.launcher()[:2] == ["systemd-run", "--user"]
    assert machine.facts()["lingers"] is True
    run = tmp_path / "experiment" / "small"
    command = [sys.executable, "-c", "print('it ran')"]
    assert agent.start(run, 1, command=command, launcher=machine.launcher()) == "started"
    while agent.status(run)["alive"]:
        time.sleep(0.05)
    assert agent.status(run)["exit"]["log"] == "it ran"
    program.write_text("#!/bin/sh\nexit 1\n")
    assert machine.launcher() == []
    assert "KillUserProcesses=no" in machine.facts()["linger_remedy"]
