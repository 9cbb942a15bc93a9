"""What a machine is, and how it stands now: cores, memory, disk, torch, GPUs, what becomes of processes at a logout.

Standard library only, for any Python from 3.9. GPUs are asked for by `nvidia-smi`, which comes with every NVIDIA driver
and reads NVML; what it does not know of a GPU is None here. No question waits for longer than its timeout, and none
raises because of the machine's state: an answer that cannot be had is None, "" or an empty list.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trainer.agent import cores

#: A GPU as :func:`facts` and :func:`readings` tell it: index, uuid, name, memory_bytes, memory_used_bytes, use (0..1 or
#: None), temperature (°C or None), power and power_limit (W or None), processes (the pids that compute on it).
Gpu = dict[str, Any]

_QUERY = (
    "index,uuid,name,memory.total,memory.used,utilization.gpu,temperature.gpu,power.draw,power.limit,driver_version"
)
#: Seconds. A driver in trouble makes nvidia-smi hang, in the kernel even.
_SMI_TIMEOUT = 10.0
#: Seconds for importing torch: minutes on a cold network disk.
_TORCH_TIMEOUT = 120.0


def facts(folder: str | Path = "~", python: str = sys.executable) -> dict[str, Any]:
    """What this machine is. `folder` is on the disk that is asked for; `python` is the interpreter asked for torch."""
    disk = shutil.disk_usage(_existing(folder))
    gpus, driver, problem = _gpus()
    kills = kills_at_logout()
    libraries = _libraries(python)
    return {
        "hostname": platform.node(),
        "system": _system(),
        "machine": platform.machine(),
        "cpu": _cpu(),
        "cores": cores(),
        "memory_bytes": _memory()[0],
        "disk_free_bytes": disk.free,
        "disk_total_bytes": disk.total,
        "python": platform.python_version(),
        "executable": sys.executable,
        "torch": libraries.get("torch"),
        "transformers": libraries.get("transformers"),
        "gpus": gpus,
        "driver": driver,
        "gpu_problem": problem,
        "lingers": None if kills is None else not kills or bool(launcher()),
        "linger_remedy": _linger_remedy() if kills and not launcher() else "",
        "time": time.time(),
    }


def readings(folder: str | Path = "~") -> dict[str, Any]:
    """How this machine stands now."""
    gpus, _, problem = _gpus()
    return {
        "gpus": gpus,
        "gpu_problem": problem,
        "memory_free_bytes": _memory()[1],
        "disk_free_bytes": shutil.disk_usage(_existing(folder)).free,
        "load": os.getloadavg()[0],
        "time": time.time(),
    }


def free_gpus(gpus: Iterable[Mapping[str, Any]]) -> list[str]:
    """The UUIDs of those on which nobody computes: no process, and next to no memory used (a driver takes a little)."""
    return [
        gpu["uuid"]
        for gpu in gpus
        if not gpu["processes"] and gpu["memory_used_bytes"] < min(1 << 30, 0.05 * gpu["memory_bytes"])
    ]


# GPUs -----------------------------------------------------------------------------------------------------------------


def _gpus() -> tuple[list[Gpu], str | None, str]:
    """The GPUs, their driver's version, and what is wrong with them: "" also where there are none."""
    smi = _smi()
    if smi is None:
        there = Path("/proc/driver/nvidia/version").exists()
        return [], None, "An NVIDIA driver is loaded, but nvidia-smi is not in the PATH." if there else ""
    said, problem = _ask(smi, f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits")
    gpus, driver, complaint = parse_gpus(said)
    if not gpus:
        return [], driver, complaint or problem or "nvidia-smi lists no GPU."
    processes, _ = _ask(smi, "--query-compute-apps=gpu_uuid,pid", "--format=csv,noheader,nounits")
    add_processes(gpus, processes)
    if any(gpu["use"] is None for gpu in gpus):  # so it is where a GPU is divided
        gpus = divided(gpus, _ask(smi, "-L")[0])
    if any(not gpu["memory_bytes"] for gpu in gpus):  # it shares the memory of the machine
        total, _ = _memory()
        gpus = [{**gpu, "memory_bytes": gpu["memory_bytes"] or total} for gpu in gpus]
    return gpus, driver, complaint


def _smi() -> str | None:
    known = ("/usr/bin/nvidia-smi", "/usr/local/nvidia/bin/nvidia-smi", "/usr/lib/wsl/lib/nvidia-smi")
    return shutil.which("nvidia-smi") or next((path for path in known if os.access(path, os.X_OK)), None)


def _ask(*command: str) -> tuple[str, str]:
    """What nvidia-smi printed, and, where it failed, its own words for why."""
    try:
        # Not run(), which waits for a killed child without end: one that hangs in the kernel cannot be killed.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    except OSError as error:
        return "", f"nvidia-smi cannot be run: {error.strerror}."
    try:
        said, _ = process.communicate(timeout=_SMI_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.stdout.close()  # type: ignore[union-attr]
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1)
        return "", f"nvidia-smi gave no answer within {_SMI_TIMEOUT:.0f} s: the driver or a GPU hangs."
    if process.returncode == 0:
        return said, ""
    return said, _clean(said) or f"nvidia-smi ended with code {process.returncode}."


def parse_gpus(csv: str) -> tuple[list[Gpu], str | None, str]:
    """The rows that nvidia-smi prints for `_QUERY`: GPUs, the driver's version, and the first line that is no row."""
    gpus: list[Gpu] = []
    driver, complaint = None, ""
    for line in csv.splitlines():
        # A name may hold a comma; nothing else does.
        fields = [field.strip() for field in line.split(",")]
        if len(fields) < 10 or not fields[0].isdigit():
            complaint = complaint or _clean(line)
            continue
        index, uuid, name = fields[0], fields[1], ", ".join(fields[2:-7])
        total, used, use, temperature, power, limit = (_number(field) for field in fields[-7:-1])
        driver = fields[-1]
        gpus.append(
            {
                "index": int(index),
                "uuid": uuid,
                "name": name,
                "memory_bytes": int((total or 0) * (1 << 20)),
                "memory_used_bytes": int((used or 0) * (1 << 20)),
                "use": None if use is None else use / 100,
                "temperature": temperature,
                "power": power,
                "power_limit": limit,
                "processes": [],
            }
        )
    return gpus, driver, complaint


def add_processes(gpus: list[Gpu], csv: str) -> None:
    """Write the pids of `--query-compute-apps=gpu_uuid,pid` to their GPUs."""
    of = {gpu["uuid"]: gpu["processes"] for gpu in gpus}
    for line in csv.splitlines():
        uuid, _, pid = line.partition(",")
        if pid.strip().isdigit() and int(pid) not in of.get(uuid.strip(), [int(pid)]):
            of[uuid.strip()].append(int(pid))


def divided(gpus: list[Gpu], listing: str) -> list[Gpu]:
    """GPUs, with the parts of those that are divided (MIG) in place of the whole, by the lines of `nvidia-smi -L`.

    A program may use a part, not the whole. nvidia-smi tells nobody which part a process is on: all of them get it.
    """
    parts: dict[str, list[Gpu]] = {}
    whole: Gpu | None = None
    for line in listing.splitlines():
        uuid = re.search(r"\(UUID: ([^)]+)\)", line)
        if uuid and line.startswith("GPU "):
            whole = next((gpu for gpu in gpus if gpu["uuid"] == uuid[1]), None)
        elif uuid and whole is not None and (profile := re.match(r"\s+MIG (\S+)", line)):
            size = re.search(r"(\d+)gb", profile[1])
            part = {**whole, "uuid": uuid[1], "name": f"{whole['name']} MIG {profile[1]}", "memory_used_bytes": 0}
            part["memory_bytes"] = int(size[1]) << 30 if size else whole["memory_bytes"]
            part["processes"] = list(whole["processes"])
            parts.setdefault(whole["uuid"], []).append(part)
    return [part for gpu in gpus for part in parts.get(gpu["uuid"], [gpu])]


def _number(text: str) -> float | None:
    """None for "[N/A]", "[Not Supported]", "[Unknown Error]", "ERR!" and their like."""
    try:
        return float(text)
    except ValueError:
        return None


def _clean(text: str) -> str:
    """The first line that says anything, printable and short."""
    lines = ["".join(letter for letter in line if letter.isprintable()).strip() for line in text.splitlines()]
    return next((line[:200] for line in lines if line), "")


# Torch ----------------------------------------------------------------------------------------------------------------

_ASK_LIBRARIES = """
import json
def tell(**known): print("KANGAROO " + json.dumps(known), flush=True)
from importlib import metadata
def version(name):
    try: return metadata.version(name)
    except metadata.PackageNotFoundError: return None
tell(torch=version("torch"), transformers=version("transformers"))
if version("torch"):
    try:
        import torch
        tell(cuda=torch.version.cuda, cuda_available=torch.cuda.is_available())
    except Exception as error:
        tell(problem=f"{type(error).__name__}: {error}"[:300])
"""


def _libraries(python: str) -> dict[str, Any]:
    """Torch and transformers of an interpreter, which need not be this one; asked in a process that may fail."""
    command = [python, "-c", _ASK_LIBRARIES]
    try:
        run = subprocess.run(
            command,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_TORCH_TIMEOUT,
            check=False,
        )
        said, problem = run.stdout, "" if run.returncode == 0 else f"import torch ended with code {run.returncode}."
    except subprocess.TimeoutExpired as late:
        said, problem = late.stdout or b"", f"import torch took longer than {_TORCH_TIMEOUT:.0f} s."
    except OSError as error:
        return {"torch": None, "transformers": None, "problem": str(error)}
    known: dict[str, Any] = {"problem": problem}
    for line in said.decode("utf-8", "replace").splitlines():
        if line.startswith("KANGAROO "):
            with contextlib.suppress(ValueError):
                known.update(json.loads(line.partition(" ")[2]))
    torch = known.get("torch") and {
        "version": known["torch"],
        "cuda": known.get("cuda"),
        "cuda_available": known.get("cuda_available", False),
        "problem": known["problem"],
    }
    return {"torch": torch, "transformers": known.get("transformers")}


# What becomes of processes at a logout --------------------------------------------------------------------------------


def kills_at_logout(root: str | Path = "/") -> bool | None:
    """Whether systemd-logind ends a user's processes when the last of their sessions ends; None if nobody can tell."""
    root = Path(root)
    if not (root / "run/systemd/system").is_dir():
        return False
    settings = _logind(root)
    if user() in settings.get("KillExcludeUsers", "root").split():
        return False
    only = settings.get("KillOnlyUsers", "").split()
    if only and user() not in only:
        return False
    value = settings.get("KillUserProcesses")
    return None if value is None else value.lower() in ("yes", "true", "on", "1")


def _logind(root: Path) -> dict[str, str]:
    """What the files of logind say, the strongest last. A setting in a comment is what it was built with."""
    folders = [root / "etc/systemd", root / "run/systemd", root / "usr/local/lib/systemd", root / "usr/lib/systemd"]
    dropped_in: dict[str, Path] = {}
    for folder in reversed(folders):
        dropped_in.update((path.name, path) for path in (folder / "logind.conf.d").glob("*.conf"))
    main = next((path for folder in folders if (path := folder / "logind.conf").is_file()), None)
    found: dict[str, str] = {}
    built_with: dict[str, str] = {}
    for path in [*([main] if main else []), *(dropped_in[name] for name in sorted(dropped_in))]:
        with contextlib.suppress(OSError):
            for line in path.read_text(errors="replace").splitlines():
                if setting := re.match(r"\s*([#;]?)\s*(Kill\w+)\s*=\s*(.*?)\s*$", line):
                    (built_with if setting[1] else found)[setting[2]] = setting[3]
    return {**built_with, **found}


def launcher() -> list[str]:
    """A command that starts another so that it outlives a logout, on a machine that would end it; else nothing.

    Only the user's own service manager can, and it stays only where the user may linger.
    """
    if not kills_at_logout() or not _lingers():
        return []
    command = ["systemd-run", "--user", "--scope", "--quiet", "--collect"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        subprocess.run([*command, "true"], stdin=subprocess.DEVNULL, capture_output=True, timeout=10, check=True)
        return command
    return []


def _lingers() -> bool:
    return Path("/var/lib/systemd/linger", user()).exists()


def _linger_remedy() -> str:
    if _lingers():
        return (
            "This machine ends what you have started when you log out (KillUserProcesses=yes in logind.conf), and "
            "`systemd-run --user --scope` does not work there. Ask its administrator to set KillUserProcesses=no."
        )
    return (
        "This machine ends what you have started when you log out (KillUserProcesses=yes in logind.conf). Run "
        "`loginctl enable-linger` there once; where that is refused, ask its administrator to run it for you."
    )


# The rest -------------------------------------------------------------------------------------------------------------


def user() -> str:
    """Who we are; a number where the number has no name, as in some containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def _existing(folder: str | Path) -> Path:
    path = Path(folder).expanduser().resolve()
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _system() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/etc/os-release").read_text().splitlines():
            if line.startswith("PRETTY_NAME="):
                return line.partition("=")[2].strip("\"'")
    return f"{platform.system()} {platform.release()}"


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory() -> tuple[int, int]:
    """Bytes of memory, and of those that are free for use: of the machine, or of the control group where it is less."""
    page = os.sysconf("SC_PAGE_SIZE")
    total = free = page * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):
        free = int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024  # type: ignore[index]
    with contextlib.suppress(OSError, ValueError):
        most = int(Path("/sys/fs/cgroup/memory.max").read_text())  # "max" where there is no limit
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        total, free = min(total, most), min(free, max(0, most - used))
    return total, free
