"""One model run, from a spec to a trained model: :func:`run`.

The run directory is the truth about a run; everything else, the web site too, reads it. Here is written:

    spec.json                the whole experiment's spec
    events.jsonl             what happened (:mod:`trainer.events`), over all attempts
    checkpoints/step-000400  Hugging Face folders with the optimizer's state beside the weights
    model/                   the finished model; where it stands, the run is done

A model that is grown finds its parent's in ../PARENT/model. One that grows on the way is trained in stages, a size
each.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib
import json
import math
import os
import platform
import resource
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from trainer import __version__, budget
from trainer.data import TEXT_FILES, Prepared, default_cache, prepare
from trainer.endings import DataError, Diverged, StopRequested, ending
from trainer.events import Event, Failed, Finished
from trainer.processes import Processes, here, is_lost
from trainer.reports import reported
from trainer.shape import GrowInit
from trainer.spec import DataSpec, ExperimentSpec, SpecError, TrainSpec, load_spec

if TYPE_CHECKING:
    import torch

    from trainer.models import Made
    from trainer.train import State

#: An event's fields, its kind included; the log adds number and time.
Fields = dict[str, Any]

#: The test split is measured on at most this many times `eval_tokens`.
TEST_TIMES = 4

_EVENT: TypeAdapter[Any] = TypeAdapter(Event)


class RunError(Exception):
    """The run cannot begin here; the message says why and what to do."""


def run(
    spec: ExperimentSpec,
    name: str,
    directory: Path,
    *,
    resume: bool = False,
    cache: Path | None = None,
    threads: int | None = None,
    attempt: int = 1,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Event]:
    """Train the model `name` of an experiment in its run directory. Yields each event after it was written there.

    With `resume` it goes on from the last checkpoint, if there is one; a finished run yields nothing. It ends early,
    with a checkpoint, once `stop()` is true or the file `stop` is there. What goes wrong ends it with a `failed`
    event; :class:`RunError` is raised, before any event, where the folder is not this run's.

    Of several processes (:mod:`trainer.processes`) the first does this, while the others :func:`follow`.
    """
    processes, step, well = here(), None, False
    try:
        with _open(spec, directory, resume) as log:
            if log.finished:
                return
            try:
                cache, wish = cache or default_cache(), _wish(stop, directory)
                for fields in _story(spec, name, directory, cache, threads, attempt, wish, processes):
                    step = fields.get("step", step)
                    yield log.write(fields)
                well = True
            except GeneratorExit:
                raise
            except BaseException as error:
                well = isinstance(error, StopRequested)
                yield log.write(_ending(error, step, processes))
    finally:
        processes.leave(well=well)


def follow(
    spec: ExperimentSpec,
    name: str,
    directory: Path,
    *,
    cache: Path | None = None,
    threads: int | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> bool:
    """What each process but the first does: the same work, of which it writes nothing. Whether it went well."""
    processes, step, well = here(), None, False
    try:
        cache, wish = cache or default_cache(), _wish(stop, directory)
        for fields in _story(spec, name, directory, cache, threads, 0, wish, processes):
            step = fields.get("step", step)
        well = True
    except StopRequested:
        well = True
    except RunError:
        pass  # the first process has found the same
    except BaseException as error:
        fields = _ending(error, step, processes)
        if processes.fail(fields):
            print(f"Process {processes.rank} of {processes.count}: {fields.get('message')}", file=sys.stderr)
    finally:
        processes.leave(well=well)
    return well


def _wish(stop: Callable[[], bool], directory: Path) -> Callable[[], bool]:
    return lambda: stop() or (directory / "stop").exists()


def _ending(error: BaseException, step: int | None, processes: Processes) -> Fields:
    """The fields of the event that ends this process's run: where another's failure was the cause, of that."""
    if isinstance(error, RunError):
        return {"kind": "failed", "reason": "error", "message": str(error), "step": step}
    if not processes.alone and (is_lost(error) or isinstance(error, StopRequested)):
        if told := processes.failure():
            return told
        if is_lost(error):
            print(f"Process {processes.rank} of {processes.count}: {error}", file=sys.stderr)
            message = f"One of the run's {processes.count} processes was lost; its log may say why."
            return {"kind": "failed", "reason": "error", "message": message, "step": step}
    return ending(error, step)


def _story(
    spec: ExperimentSpec,
    name: str,
    directory: Path,
    cache: Path,
    threads: int | None,
    attempt: int,
    stop: Callable[[], bool],
    processes: Processes,
) -> Iterator[Fields]:
    """The fields of the run's events, in order; all processes go through it."""
    began = time.perf_counter()
    yield {
        "kind": "started",
        "attempt": attempt,
        "pid": os.getpid(),
        "hostname": socket.gethostname(),
        "versions": {"python": platform.python_version(), "kangaroo": __version__},
    }

    settings = spec.train_of(name)
    _check_share(settings, processes)
    # What torch.compile makes outlives the run, like the text.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache.parent / "compiled"))
    # Importing torch and the model classes takes seconds, so it goes on beside the preparation of the text.
    imports = threading.Thread(target=_import_torch, daemon=True)
    imports.start()
    if _reads_with_libraries(spec.data):
        imports.join()  # `datasets` looks into transformers, and fails where that is half imported
    if processes.first:
        work = functools.partial(prepare, spec.data, cache)
        prepared = yield from reported(work, stop, StopRequested(0, None))
        for note in prepared.notes:
            yield {"kind": "warning", "message": note}
        imports.join()
        processes.from_first("the text", prepared.fingerprint, stop)
    else:
        imports.join()
        fingerprint = processes.from_first("the text", None, stop)
        prepared = prepare(spec.data, cache)  # it is there
        if prepared.fingerprint != fingerprint:
            raise DataError("The text has changed while it was prepared. Begin again.")

    import torch
    from transformers.utils import logging

    from trainer import evaluate, models, train

    logging.disable_progress_bar()  # it would draw one for each file it writes
    torch.set_num_threads(threads or torch.get_num_threads())
    torch.set_float32_matmul_precision("high")
    device = _device(processes)
    processes.begin(device)
    tokens = prepared.train.array()
    _check_lengths(settings, prepared)
    total_steps = budget.training_steps(settings, prepared.train.n_tokens)
    assert total_steps is not None
    stages = budget.stages(spec.models[name], total_steps)
    _check_stages(name, stages, total_steps)
    validation = evaluate.windows(prepared.validation.array(), settings.n_ctx, settings.eval_tokens)
    test = evaluate.windows(prepared.test.array(), settings.n_ctx, TEST_TIMES * settings.eval_tokens)
    makes = models.Maker(spec, name, directory, prepared, device, processes, stop)

    identity = {"the text": prepared.fingerprint, "the number of steps": total_steps, "the seed": settings.seed}
    resumed = train.checkpoints(directory)[-1:]
    if resumed:
        state, precision, record = train.load_state(resumed[0], identity)
        made = makes.resumed(resumed[0], stages[state.stage].shape, state, record)
    else:
        yield {"kind": "preparing", "what": "making the first weights"}
        state = train.State()
        widest = max((m.shape.d_model for m in spec.models.values() if m.shape), default=768)
        precision = train.choose_precision(settings.precision, widest, device) if processes.first else ""
        precision = processes.from_first("the precision", precision, stop)
        made = yield from makes.first(stages[0].shape, precision)
        state = made.charged_to(state)

    setup_seconds = time.perf_counter() - began - made.learning_seconds
    state = replace(state, setup_seconds=state.setup_seconds + setup_seconds)
    sizes = [makes.sizes(made, stage.shape) for stage in stages]
    size = budget.parameters(spec.models[name].family, *sizes[-1])
    yield {
        "kind": "prepared",
        "parameters": size.total,
        "non_embedding_parameters": size.non_embedding,
        "d_vocab": sizes[-1].d_vocab,
        "train_tokens": prepared.train.n_tokens,
        "validation_tokens": prepared.validation.n_tokens,
        "test_tokens": prepared.test.n_tokens,
        "bytes_per_token": prepared.validation.bytes_per_token,
        "data_fingerprint": prepared.fingerprint,
        "total_steps": total_steps,
        "tokens_per_step": settings.tokens_per_step,
        "flops_per_token": budget.mean_flops_per_token(spec.models[name].family, sizes, stages, settings.n_ctx),
        "device": device.type,
        "device_name": _device_name(device, processes),
        "processes": processes.count,
        "precision": precision,
        "threads": torch.get_num_threads(),
        "seed": settings.seed,
        "resumed_from": state.step if resumed else None,
        "setup_seconds": setup_seconds,
        "versions": {
            package: _version(package) for package in ("torch", "transformers", "tokenizers", "safetensors", "numpy")
        },
    }

    while True:
        if made.grown:
            yield {"kind": "grown", "step": state.step, **made.grown}
        last = state.stage == len(stages) - 1
        task = train.Task(
            settings=settings,
            directory=directory,
            tokenizer=prepared.tokenizer,
            tokens=tokens,
            held_out=validation,
            bytes_per_token=prepared.validation.bytes_per_token,
            batch_seed=spec.train.seed,
            total_steps=total_steps,
            flops_per_token=made.flops_per_token,
            precision=precision,
            identity=identity,
            processes=processes,
            stage_end=None if last else stages[state.stage].end,
            growth=made.record,
            newcomers=made.newcomers,
        )
        stretch = train.train(made.model, made.optimizer, task, state, stop)
        state = yield from (_watched(stretch, made, settings, state.stage_step) if processes.first else stretch)
        if last:
            break
        began = time.perf_counter()
        del made, stretch, task  # both sizes will be there when the growth is measured: a third copy would be too many
        following = stages[state.stage + 1].shape
        assert following is not None
        made = yield from makes.next(following, state.stage + 1, state.step, precision)
        seconds = state.setup_seconds + time.perf_counter() - began - made.learning_seconds
        state = made.charged_to(replace(state, stage=state.stage + 1, stage_step=state.step, setup_seconds=seconds))

    start = time.perf_counter()
    figures = evaluate.evaluate(
        made.model, test, precision=precision, bytes_per_token=prepared.test.bytes_per_token, processes=processes
    )
    if not math.isfinite(figures["cross_entropy"]):
        raise Diverged(state.step, "The test loss")
    seconds = time.perf_counter() - start
    yield {"kind": "eval", "split": "test", **state.progress(), **figures, "eval_seconds": seconds}

    if not processes.first:
        return
    tokenizer = _tokenizer(prepared)
    for sample in evaluate.samples(made.model, tokenizer, test, prepared.end_of_text):
        yield {"kind": "sample", "step": state.step, **sample}
    models.save(made, prepared.tokenizer, directory / "model", with_optimizer=_optimizer_is_wanted(spec, name))
    yield {
        "kind": "finished",
        **state.progress(),
        "eval_seconds": state.eval_seconds + seconds,
        "setup_seconds": state.setup_seconds,
        "tokens_per_second": state.tokens / state.train_seconds if state.train_seconds else 0.0,
        "peak_memory_bytes": max(_peak_memory(device), state.peak_bytes),
    }


# --- Making ready -----------------------------------------------------------------------------------------------------


def _import_torch() -> None:
    with contextlib.suppress(Exception):  # what is wrong is raised again, and reported, by the main thread's import
        importlib.import_module("trainer.models")
        importlib.import_module("transformers.models.auto.modeling_auto")


def _reads_with_libraries(data: DataSpec) -> bool:
    """Whether `datasets` or transformers may read the text or its tokenizer: not where it is plain files and a BPE."""
    plain = data.kind == "built-in" or (data.kind == "local" and Path(data.source).suffix in TEXT_FILES)
    return not plain or data.tokenizer.kind != "bpe"


def _check_share(settings: TrainSpec, processes: Processes) -> None:
    if not processes.alone and os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        raise RunError("The processes of a run must be on one machine: torchrun --nnodes 1 would be right.")
    size, count = settings.batch_size, processes.count
    if size % count:
        right = " or ".join(str(n) for n in (size // count * count, (size // count + 1) * count) if n)
        raise RunError(
            f"train.batch_size {size}: {count} processes share each batch in equal parts; {right} would be right, or "
            "another number of processes."
        )


def _device(processes: Processes) -> torch.device:
    """A GPU of its own for each process, where there is any."""
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    if processes.alone:
        return torch.device("cuda")
    if processes.count > torch.cuda.device_count():
        raise RunError(
            f"The run has {processes.count} processes, but {torch.cuda.device_count()} GPUs are visible; each process "
            "needs its own."
        )
    torch.cuda.set_device(processes.rank)
    return torch.device("cuda", processes.rank)


def _check_lengths(settings: TrainSpec, prepared: Prepared) -> None:
    if prepared.train.n_tokens < settings.n_ctx + 1:
        raise DataError(
            f"The training split has {prepared.train.n_tokens:,} tokens; n_ctx {settings.n_ctx} needs at least "
            f"{settings.n_ctx + 1:,}."
        )
    for split in (prepared.validation, prepared.test):
        if split.n_tokens < 2:
            raise DataError(f"The split {split.path.stem} has {split.n_tokens} token; at least 2 are needed.")


def _check_stages(name: str, stages: list[budget.Stage], total_steps: int) -> None:
    if len(stages) > 1 and stages[-1].begin >= total_steps:
        raise RunError(
            f"models.{name}.init.ladder: its last growth would be after {stages[-1].begin} steps, but num_epochs ends "
            f"training after {total_steps}; fewer steps before it, or more epochs, would be right."
        )


def _watched(
    events: Generator[Fields, None, State], made: Made, settings: TrainSpec, began: int
) -> Generator[Fields, None, State]:
    """What `train` tells of a grown model, with how far its copies have parted at each evaluation.

    A warning follows where they are still alike at the first that is made once warm-up is over and the model has been
    trained for `eval_every` steps since it grew, after `began` steps.
    """
    from trainer.symmetry import warning, whole_axes

    symmetry, every = made.symmetry(), settings.eval_every
    if symmetry is None:
        return (yield from events)
    due = max(began + every, settings.warmup_steps)
    while True:
        try:
            fields = next(events)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        if fields["kind"] != "eval":
            yield fields
            continue
        rows = symmetry.measure()
        yield {**fields, "symmetry": whole_axes(rows)}
        before = (fields["step"] - 1) // every * every  # the evaluation before this one
        if before < due <= fields["step"] and (message := warning(rows)):
            yield {"kind": "warning", "message": message}


def _optimizer_is_wanted(spec: ExperimentSpec, name: str) -> bool:
    """Whether a model that is grown from this one goes on with AdamW's moments."""
    inits = [model.init for model in spec.models.values()]
    return any(isinstance(init, GrowInit) and init.parent == name and init.optimizer == "grown" for init in inits)


def _tokenizer(prepared: Prepared) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(prepared.tokenizer / "tokenizer.json"))


# --- What a run knows about itself ------------------------------------------------------------------------------------


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _device_name(device: torch.device, processes: Processes) -> str:
    import torch

    if device.type == "cuda":
        times = "" if processes.alone else f"{processes.count} x "
        return times + str(torch.cuda.get_device_name(device))
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU's memory there, else the largest resident size of the process."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# --- The event log ----------------------------------------------------------------------------------------------------


class EventLog:
    """`events.jsonl`, appended to: numbers go on over all attempts, and a line that a crash tore is taken away.

    Locked for as long as this process lives: two trainers in one run directory would each undo the other's work.
    Raises :class:`RunError` where another has it.
    """

    def __init__(self, path: Path):
        self.path = path
        self.events = 0
        self.last: Fields | None = None
        self._file = path.open("ab")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise RunError(f"another process trains in {path.parent}; wait for it, or stop it first.") from None
        whole = 0
        with path.open("rb") as file:
            for line in file:
                try:
                    event = json.loads(line)
                except ValueError:
                    break
                if not line.endswith(b"\n"):
                    break
                self.last, self.events = event, event["seq"] + 1
                whole += len(line)
        os.truncate(path, whole)

    def __enter__(self) -> EventLog:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    @property
    def finished(self) -> bool:
        return self.last is not None and self.last["kind"] == "finished"

    def write(self, fields: Fields) -> Event:
        event: Event = _EVENT.validate_python({"seq": self.events, "at": datetime.now(UTC), **fields})
        self._file.write(event.model_dump_json().encode() + b"\n")
        self._file.flush()
        if isinstance(event, Finished | Failed):
            os.fsync(self._file.fileno())
        self.events += 1
        return event


def _open(spec: ExperimentSpec, directory: Path, resume: bool) -> EventLog:
    directory.mkdir(parents=True, exist_ok=True)
    held = directory / "spec.json"
    if held.exists():
        try:
            same = load_spec(held) == spec
        except SpecError:
            same = False
        if not same:
            raise RunError(f"{held} is of another experiment; choose another folder for this one.")
    else:
        held.write_text(spec.to_json())
    log = EventLog(directory / "events.jsonl")
    if not resume and log.events and not log.finished:
        log.__exit__()
        raise RunError(f"{directory} holds a run that was begun before; go on with it by --resume.")
    return log
