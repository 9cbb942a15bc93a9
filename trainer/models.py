"""The model of a run, at each of its sizes: drawn at random, read from a checkpoint, or grown; and its optimizer.

Of several processes the first grows, the others load what it has grown, and the first alone measures.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Container, Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from trainer import attention, budget, evaluate, train
from trainer.data import Prepared
from trainer.endings import CheckpointError, DataError, StopRequested
from trainer.families import Described, FamilyError, build_model, get_family, read_config
from trainer.growth import GrowthError, GrowthPlan, plan
from trainer.growth.apply import SourceError, grow_checkpoint
from trainer.growth.learn import Learned, learn
from trainer.growth.lineage import lineage
from trainer.growth.moments import LrScale, grow_moments, lr_scales, new_entries
from trainer.processes import Processes
from trainer.reports import Report, reported
from trainer.shape import CheckpointInit, GrowInit, RandomInit, Shape
from trainer.spec import ExperimentSpec, TrainSpec, for_transformers
from trainer.symmetry import Symmetry, whole_axes
from trainer.train import Fields, Newcomers, State

#: Tells `preparing` events, and returns.
Making = Generator[Fields, None, "Made"]

#: Growth is measured on at most this many held-out tokens, in float32.
GROWTH_TOKENS = 16_384


@dataclass(frozen=True)
class Made:
    """A model that is ready to be trained, at one of the sizes that its run goes through."""

    model: Any
    optimizer: torch.optim.AdamW
    described: Described
    flops_per_token: float
    plan: GrowthPlan | None = None  # by which it came to this size
    earlier: tuple[GrowthPlan, ...] = ()  # by which it came to those before, in this run
    record: Fields = field(default_factory=dict)  # what a checkpoint must say of that, as JSON
    newcomers: Newcomers | None = None
    grown: Fields = field(default_factory=dict)  # of the `grown` event; empty where it was not grown just now
    learning_flops: float = 0.0
    learning_seconds: float = 0.0
    learning_bytes: int = 0

    def symmetry(self) -> Symmetry | None:
        """What tells how far its copies have parted; None where it was not grown."""
        return None if self.plan is None else Symmetry(self.model, self.plan, self.earlier)

    def charged_to(self, state: State) -> State:
        """`state` at the beginning of this model's stage: what learning the maps took is its run's."""
        flops = state.flops + self.learning_flops
        return replace(
            state,
            flops=flops,
            stage_flops=flops,
            train_seconds=state.train_seconds + self.learning_seconds,
            peak_bytes=max(state.peak_bytes, self.learning_bytes),
        )


class Maker:
    """Makes the model `name` of an experiment."""

    def __init__(
        self,
        spec: ExperimentSpec,
        name: str,
        directory: Path,
        prepared: Prepared,
        device: torch.device,
        processes: Processes,
        stop: Callable[[], bool],
    ):
        self.spec, self.name, self.directory, self.prepared = spec, name, directory, prepared
        self.device, self.processes = device, processes
        # Of several, the others wait for the first to have grown it: they would take its leaving for its loss.
        self.stop = stop if processes.alone else lambda: False
        self.wanted, self.settings = spec.models[name], spec.train_of(name)
        self.family = get_family(self.wanted.family)

    def first(self, shape: Shape | None, precision: str) -> Making:
        """Before the run's first step, of that shape; None: of the checkpoint's."""
        init = self.wanted.init
        if isinstance(init, RandomInit):
            return self._ready(self._random().to(self.device), shape)
        if isinstance(init, CheckpointInit):
            return self._ready(self._read(init), shape)
        assert shape is not None
        source = self.directory.parent / init.parent / "model"
        if not (source / "config.json").exists():
            raise CheckpointError(
                f"{self.name} is grown from {init.parent}, which has no finished model in {source}; train it first."
            )
        if (source / "tokenizer.json").read_bytes() != (self.prepared.tokenizer / "tokenizer.json").read_bytes():
            raise CheckpointError(
                f"{init.parent} was trained with another tokenizer than {self.name} would be: the text has changed "
                "since. Train both in a new run."
            )
        return (yield from self._grown(init, source, init.parent, shape, 0, 0, precision))

    def next(self, shape: Shape, stage: int, step: int, precision: str) -> Making:
        """Grown from the run's own checkpoint after `step` steps, where its stage number `stage` begins."""
        assert isinstance(self.wanted.init, GrowInit)
        source = self.directory / train.checkpoint_path(step)
        return (yield from self._grown(self.wanted.init, source, self.name, shape, stage, step, precision))

    def resumed(self, folder: Path, shape: Shape | None, state: State, record: Fields) -> Made:
        """From a checkpoint, its state, and what it says of how it came to its size."""
        growth, init = None, self.wanted.init
        if "parent" in record and isinstance(init, GrowInit):
            assert shape is not None
            parent = Described(Shape.model_validate(record["parent"][0]), *record["parent"][1:])
            growth = self._plan(init, parent, shape, self._asked(init, state.stage))
        made = self._ready(load_model(folder, self.device), shape, growth, record, state.stage)
        train.load_optimizer(made.optimizer, made.model, folder)
        if isinstance(init, GrowInit) and init.optimizer == "grown" and state.step - state.stage_step < Newcomers.STEPS:
            made = replace(made, newcomers=self._newcomers(made))
        return made

    def sizes(self, made: Made, shape: Shape | None) -> Described:
        """Of this run's model where it has another shape."""
        return made.described if shape is None else made.described._replace(shape=shape)

    # Random or read ------------------------------------------------------------------------------------------------

    def _random(self) -> Any:
        """New weights: matrices from N(0, init_range), biases zero, gains such that norms multiply by one.

        All matrices alike: GPT-2's usual smaller range for the matrices that write to the residual stream (Radford et
        al. 2019) is not used, in any family.
        """
        init, end = self.wanted.init, self.prepared.end_of_text
        assert self.wanted.shape is not None
        assert isinstance(init, RandomInit)
        sizes = (self.wanted.shape, self.settings.n_ctx, self._d_vocab(), self.wanted.tie_embeddings)
        ones = {p.name for p in self.family.parameters(*sizes) if p.fresh == "ones"}
        config = self.family.config(
            *sizes,
            init_range=init.init_range,
            bos_token_id=end,
            eos_token_id=end,
            pad_token_id=end,
        )
        made = build_model(config)
        generator = torch.Generator().manual_seed(self.settings.seed)
        with torch.no_grad():
            for path, parameter in made.named_parameters():
                if parameter.dim() >= 2:
                    parameter.normal_(0.0, init.init_range, generator=generator)
                else:
                    parameter.fill_(1.0 if path in ones else 0.0)
        return made

    def _d_vocab(self) -> int:
        """The spec's vocabulary size where it gives one: what the plan counted is what is built."""
        wanted = self.spec.data.tokenizer.d_vocab or self.prepared.d_vocab
        if wanted < self.prepared.d_vocab:
            raise DataError(
                f"data.tokenizer.d_vocab is {wanted:,}, but the tokenizer has {self.prepared.d_vocab:,} tokens; leave "
                "it out or give at least that."
            )
        return wanted

    def _read(self, init: CheckpointInit) -> Any:
        try:
            source = for_transformers(init.path)
        except ValueError as error:
            raise CheckpointError(f"{init.path} cannot be loaded: {error}") from error
        if not self.processes.first:
            self.processes.wait()  # until the first has it: it may have to be fetched
        loaded = load_model(source, self.device)
        if self.processes.first:
            self.processes.wait()
        return loaded

    # Grown ---------------------------------------------------------------------------------------------------------

    def _grown(
        self, init: GrowInit, source: Path, parent: str, shape: Shape, stage: int, step: int, precision: str
    ) -> Making:
        start = time.perf_counter()
        weights, learned = self.directory / ".grown", None
        try:
            if not self.processes.first:
                self.processes.wait()  # until the first has grown it: before, its source may not be there either
            described = self.family.shape_of(read_config(source))
            growth = self._plan(init, described, shape, self._asked(init, stage))
            if self.processes.first:
                shutil.rmtree(weights, ignore_errors=True)

                def grow(report: Report) -> None:
                    def progress(done: int, total: int, what: str) -> None:
                        report(f"{what} the grown model, in bytes", done, total)

                    # Noise of a later growth is to be none that is in the weights already.
                    seed = self.settings.seed + (stage << 32)
                    grow_checkpoint(source, weights, growth, seed, progress=progress)

                stopped = StopRequested(step, str(train.checkpoint_path(step)) if step else None)
                yield from reported(grow, self.stop, stopped)
                if init.learn_steps:
                    what = f"learning the maps of growth, in {init.learn_steps:,} steps"
                    yield {"kind": "preparing", "what": what, "done": None, "total": None}
                    learned = self._learn(init, source, weights, growth, stage, precision, stopped)
                self.processes.wait()
            child = load_model(weights, self.device)
            record = self._record(init, described, growth, source)
            made = self._ready(child, shape, growth, record, stage)
            if init.optimizer == "grown":
                self._fill_optimizer(made, grow_moments(source, growth))
                made = replace(made, newcomers=self._newcomers(made))
            self.processes.wait()
        except (FamilyError, GrowthError, SourceError) as error:
            raise CheckpointError(f"{self.name} cannot be grown from {source}: {error}") from error
        finally:
            if self.processes.first:
                shutil.rmtree(weights, ignore_errors=True)
        if not self.processes.first:
            return made
        old = load_model(source, self.device)
        tokens = min(GROWTH_TOKENS, self.settings.eval_tokens)
        held_out = evaluate.windows(self.prepared.validation.array(), self.settings.n_ctx, tokens)
        grown: Fields = {
            "parent": parent,
            "width": init.width,
            "depth": init.depth,
            "preserves": growth.preserves and learned is None,
            **evaluate.compare(old, child, held_out),
            "seconds": time.perf_counter() - start,
            "new_parameters": _count(child) - _count(old),
            "parameters": _count(child),
            "optimizer": init.optimizer,
            "lineage": lineage(growth).plain(),
            "symmetry": whole_axes(Symmetry(child, growth, made.earlier).measure()),
        }
        if learned is None:
            return replace(made, grown=grown)
        grown["learned"] = {
            "steps": init.learn_steps,
            "tokens": init.learn_steps * self.settings.tokens_per_step,
            "loss_before": learned.losses[0],
            "loss_after": learned.losses[-1],
            "flops": learned.flops,
            "seconds": learned.seconds,
            "peak_memory_bytes": learned.peak_bytes,
        }
        return replace(
            made,
            grown=grown,
            learning_flops=learned.flops,
            learning_seconds=learned.seconds,
            learning_bytes=learned.peak_bytes,
        )

    def _learn(
        self,
        init: GrowInit,
        source: Path,
        weights: Path,
        growth: GrowthPlan,
        stage: int,
        precision: str,
        stopped: StopRequested,
    ) -> Learned:
        """Train the maps, and put what they make into the folder of the plan's child.

        On batches in an order of their own: those of training are to be as new to this model as to any other. In this
        thread, not one of its own: what that had of memory for activations would not be had for training again.
        """
        child = load_model(weights, self.device)
        batches = train.Batches(
            self.prepared.train.array(),
            self.settings.n_ctx,
            self.settings.batch_size,
            self.spec.train.seed + (stage + 1 << 32),
        )

        def progress(done: int, total: int, loss: float) -> None:
            if self.stop():
                raise stopped

        learned = learn(
            load_model(source, self.device),
            growth,
            child.state_dict(),
            (batches.at(at, self.device) for at in range(init.learn_steps)),
            steps=init.learn_steps,
            lr=init.learn_lr,
            seed=self.settings.seed,
            device=self.device,
            progress=progress,
            precision=precision,
        )
        child.load_state_dict(learned.state)
        child.save_pretrained(weights)
        return learned

    def _plan(self, init: GrowInit, parent: Described, shape: Shape, asked: Shape | None) -> GrowthPlan:
        """`asked`: the parent's shape as the spec has it. A grown one has the eps that its growth needed, so an eps
        that the spec does not change stays that."""
        if asked is not None and asked.layer_norm_eps == shape.layer_norm_eps:
            shape = shape.model_copy(update={"layer_norm_eps": parent.shape.layer_norm_eps})
        sizes: Any = {"n_positions": parent.n_positions, "d_vocab": parent.d_vocab, "tied": parent.tied}
        return plan(self.wanted.family, parent.shape, shape, init, **sizes)

    def _asked(self, init: GrowInit, stage: int) -> Shape | None:
        """The shape, by the spec, of what the model grows from as its stage number `stage` begins."""
        return init.ladder[stage - 1].shape if stage else self.spec.models[init.parent].shape

    def _record(self, init: GrowInit, parent: Described, growth: GrowthPlan, source: Path) -> Fields:
        record: Fields = {"parent": [parent.shape.model_dump(), *parent[1:]]}
        if init.lr_by_width:
            record["lr_scales"] = lr_scales(growth, _scales_of(source))
        return record

    def _fill_optimizer(self, made: Made, moments: Iterable[tuple[str, Any]]) -> None:
        held = dict(made.model.named_parameters())

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            for place, array in moments:
                key, _, name = place.partition("/")
                yield f"{key}/{self._name(name, held)}", torch.from_numpy(array)

        train.fill_optimizer(made.optimizer, made.model, tensors())

    def _newcomers(self, made: Made) -> Newcomers | None:
        if made.plan is None:
            return None
        held = dict(made.model.named_parameters())
        new = ((self._name(name, held), torch.from_numpy(entries)) for name, entries in new_entries(made.plan))
        return Newcomers(made.model, made.optimizer, new)

    def _name(self, name: str, held: Container[str]) -> str:
        """What a transformers model calls a parameter of the family's."""
        return name if name in held else self.family.also_named[name]

    # Ready ---------------------------------------------------------------------------------------------------------

    def _ready(
        self,
        model: Any,
        shape: Shape | None,
        growth: GrowthPlan | None = None,
        record: Fields | None = None,
        stage: int = 0,
    ) -> Made:
        """`model` with a fresh optimizer, if it is what the spec says."""
        described = self._described(model, shape)
        _check_fits(model, self.prepared, self.settings)
        attention.use_in(model)
        scales, held = _as_scales((record or {}).get("lr_scales")), dict(model.named_parameters())
        if scales is not None:
            scales = {self._name(name, held): scale for name, scale in scales.items()}
        return Made(
            model=model,
            optimizer=train.make_optimizer(model, self.settings, scales),
            described=described,
            flops_per_token=budget.flops_per_token(
                self.family.name, described.shape, self.settings.n_ctx, described.d_vocab, described.tied
            ),
            plan=growth,
            earlier=budget.sheet(self.spec)[self.name].growths[:stage],
            record=record or {},
        )

    def _described(self, model: Any, shape: Shape | None) -> Described:
        """What was made or loaded, which must be of `shape`; but a grown model has the eps that its growth needs."""
        at = f"models.{self.name}"
        if model.config.model_type != self.family.name:
            raise CheckpointError(f"{at}.family is {self.family.name!r}, the checkpoint's {model.config.model_type!r}.")
        try:
            found = self.family.shape_of(model.config.to_dict())
        except FamilyError as error:
            raise CheckpointError(f"{at}.init.path: {error}") from error
        left_out = {"n_kv_heads"} | ({"layer_norm_eps"} if isinstance(self.wanted.init, GrowInit) else set())

        def plain(shape: Shape) -> Fields:
            return {**shape.model_dump(exclude=left_out), "n_kv_heads": shape.kv_heads}

        if shape is not None and plain(shape) != plain(found.shape):
            raise CheckpointError(
                f"{at}.shape is not the checkpoint's, {found.shape.model_dump_json()}; leave it out to take that."
            )
        return found


def load_model(path: Path | str, device: torch.device) -> Any:
    """A model in float32 from a Hugging Face folder or a name on the Hub."""
    from transformers import AutoModelForCausalLM

    try:
        model, loaded = AutoModelForCausalLM.from_pretrained(
            str(path),
            dtype=torch.float32,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError) as error:
        raise CheckpointError(f"{path} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    if missing := sorted(loaded["missing_keys"]):  # transformers would fill them with random numbers
        raise CheckpointError(f"{path} lacks the weights {', '.join(missing[:3])}{' ...' if missing[3:] else ''}.")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # its config keeps what it said
    for parameter in model.parameters():
        # A copy: memory mapped from a file is not aligned as torch's own, and may be summed in another order.
        parameter.data = parameter.data.clone()
    return model.to(device)


def save(made: Made, tokenizer: Path, folder: Path, *, with_optimizer: bool) -> None:
    """The finished model, with what a model that is grown from it may need beside the weights."""

    def rest(folder: Path) -> None:
        if with_optimizer:
            train.save_optimizer(made.optimizer, made.model, folder)
        if "lr_scales" in made.record:
            (folder / train.STATE_FILE).write_text(json.dumps({"growth": made.record}, indent=1))

    train.save_model(made.model, tokenizer, folder, rest)


def _scales_of(folder: Path) -> dict[str, LrScale] | None:
    """What the rates of a model were multiplied with; None where it was trained with one rate for all."""
    try:
        held = json.loads((folder / train.STATE_FILE).read_text())
    except FileNotFoundError:
        return None
    return _as_scales(held.get("growth", {}).get("lr_scales"))


def _as_scales(held: Fields | None) -> dict[str, LrScale] | None:
    return None if held is None else {name: LrScale(*scale) for name, scale in held.items()}


def _count(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


def _check_fits(model: Any, prepared: Prepared, settings: TrainSpec) -> None:
    if model.config.vocab_size < prepared.d_vocab:
        raise CheckpointError(
            f"The model has {model.config.vocab_size:,} tokens, the tokenizer {prepared.d_vocab:,}; they do not belong "
            "together."
        )
    if model.config.max_position_embeddings < settings.n_ctx:
        raise CheckpointError(
            f"train.n_ctx is {settings.n_ctx}, but the model has {model.config.max_position_embeddings} positions; at "
            "most that many would be right."
        )
