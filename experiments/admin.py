"""The administrator's view of experiments, model runs, growths and hosts.

Rows that a follower writes are shown, never edited: what the database says of a run is what happened in its run
directory. Whoever wants a run to stop or to go on uses the actions, which ask for it in the same way as the site does.

A person's machine is theirs: an administrator sees how it stands, may offer it to all and may retire it. How it is
reached and what opens it is changed by its owner, on its own pages, and no credential is shown.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

from django.contrib import admin, messages
from django.db.models import Count, Q, QuerySet
from django.http import HttpRequest
from django.urls import reverse
from django.utils import timezone
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString

from experiments import credentials, growths, jobs
from experiments.host_standing import HostStanding
from experiments.models import (
    ACTIVE,
    Experiment,
    Growth,
    Host,
    HostKeyPin,
    HostTask,
    ModelRun,
    Removal,
    State,
    Transfer,
)
from experiments.templatetags import figures


def _state(state: str, text: str) -> SafeString:
    return format_html('<span class="state state-{}">{}</span>', state, text)


def _pretty(data: Any) -> SafeString:
    return format_html('<pre class="json">{}</pre>', json.dumps(data, indent=2)) if data else SafeString("–")


def _run_state(run: ModelRun) -> SafeString:
    return _state(run.state, run.get_state_display())


class Actions(admin.ModelAdmin):  # type: ignore[type-arg]
    """Stop, resume and requeue, for experiments and for single runs."""

    actions = ("stop", "resume", "requeue")

    class Media:
        css = {"all": ["css/admin.css"]}

    def _for_each(
        self, request: HttpRequest, queryset: Iterable[Any], act: Callable[[Any], int], done: str, nothing: str
    ) -> None:
        """Do `act`, which says how many runs it concerned, to each; say what came of it."""
        count = 0
        for target in queryset:
            try:
                count += act(target)
            except jobs.LimitReached as limit:
                self.message_user(request, f"{target}: {limit}", messages.ERROR)
        runs = "1 run" if count == 1 else f"{count} runs"
        self.message_user(
            request, done.format(runs=runs) if count else nothing, messages.INFO if count else messages.WARNING
        )

    @admin.action(description="Stop: write a checkpoint, then end", permissions=["change"])
    def stop(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        def act(target: Experiment | ModelRun) -> int:
            active = _runs_of(target).filter(state__in=ACTIVE).count()
            jobs.request_stop(target)
            return active

        self._for_each(request, queryset, act, "{runs} asked to stop.", "None of these is queued or running.")

    @admin.action(description="Resume from the last checkpoint", permissions=["change"])
    def resume(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        self._for_each(
            request,
            queryset,
            lambda target: len(jobs.resume(target)),
            "{runs} queued again.",
            "None of these has failed or was stopped.",
        )

    @admin.action(description="Requeue: a queue job for each that waits or runs without one", permissions=["change"])
    def requeue(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        def act(target: Experiment | ModelRun) -> int:
            jobs.submit(target if isinstance(target, Experiment) else target.experiment)
            return _runs_of(target).filter(state__in=ACTIVE).count()

        self._for_each(request, queryset, act, "{runs} looked after.", "None of these is queued or running.")
        jobs.reconcile()  # those that run, but that nobody follows


def _runs_of(target: Experiment | ModelRun) -> QuerySet[ModelRun]:
    runs: QuerySet[ModelRun] = ModelRun.objects.all()
    return runs.filter(experiment=target) if isinstance(target, Experiment) else runs.filter(pk=target.pk)


class ShownInline(admin.TabularInline):  # type: ignore[type-arg]
    """Rows that are shown, and neither added, changed nor deleted here."""

    extra = 0
    can_delete = False

    def has_add_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False


class ModelRunInline(ShownInline):
    model = ModelRun
    fields = readonly_fields = (
        "run",
        "host",
        "status",
        "reason",
        "attempt",
        "progress",
        "validation_loss",
        "ended_at",
    )

    @admin.display(description="model")
    def run(self, run: ModelRun) -> SafeString:
        return format_html('<a href="{}">{}</a>', reverse("admin:experiments_modelrun_change", args=[run.pk]), run.name)

    @admin.display(description="state")
    def status(self, run: ModelRun) -> SafeString:
        return _run_state(run)

    @admin.display(description="step")
    def progress(self, run: ModelRun) -> str:
        return _progress(run)

    @admin.display(description="validation loss")
    def validation_loss(self, run: ModelRun) -> str:
        return figures.loss(run.validation_cross_entropy)


def _progress(run: ModelRun) -> str:
    return f"{run.step:,} of {run.total_steps:,}" if run.total_steps else f"{run.step:,}"


@admin.register(Experiment)
class ExperimentAdmin(Actions):
    list_display = ("name", "owner", "states", "host", "is_public", "created")
    list_filter = (("runs__state", admin.ChoicesFieldListFilter), "host", "is_public", "created")
    list_select_related = ("owner", "host")
    list_per_page = 50
    search_fields = ("=id", "name", "notes", "owner__email", "owner__name")
    search_help_text = "Name, notes, the owner's name or address, or a whole id."
    date_hierarchy = "created"
    show_full_result_count = False
    autocomplete_fields = ("owner",)
    fields = ("name", "notes", "owner", "is_public", "id", "host", "created", "directory", "spec")
    readonly_fields = ("id", "host", "created", "directory", "spec")
    inlines = (ModelRunInline,)

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        counts = {f"n_{state}": Count("runs", filter=Q(runs__state=state), distinct=True) for state in State.values}
        queryset: QuerySet[Any] = super().get_queryset(request).annotate(**counts)
        return queryset

    @admin.display(description="model runs")
    def states(self, experiment: Any) -> SafeString:
        counts = ((state, getattr(experiment, f"n_{state}")) for state in State.values)
        return format_html_join(" ", "{}", ((_state(state, f"{n} {state}"),) for state, n in counts if n))

    @admin.display(description="spec")
    def spec(self, experiment: Experiment) -> SafeString:
        return _pretty(experiment.spec_json)

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False  # the Train page checks a spec; here nothing would

    def delete_model(self, request: HttpRequest, obj: Experiment) -> None:
        jobs.delete(obj)

    def delete_queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        for experiment in queryset:
            jobs.delete(experiment)

    def get_deleted_objects(
        self, objs: Any, request: HttpRequest
    ) -> tuple[list[Any], dict[str, int], set[str], list[Any]]:
        """What goes, in a line each: a curve may have twenty thousand points, which nobody wants listed."""
        lines = [
            f"{experiment.name}: its runs, which are stopped, their curves and run directories" for experiment in objs
        ]
        return lines, {"experiments": len(lines)}, set(), []


@admin.register(ModelRun)
class ModelRunAdmin(Actions):
    list_display = ("name", "of", "owner", "status", "reason", "host", "progress", "attempt", "queued_at", "ended_at")
    list_display_links = ("name",)
    list_filter = ("state", "reason", "host", "queued_at", "ended_at")
    list_select_related = ("experiment__owner", "host")
    list_per_page = 50
    search_fields = ("name", "=experiment__id", "experiment__name", "experiment__owner__email", "detail")
    search_help_text = (
        "Name of the model or its experiment, the owner's address, words of an error, or an experiment's id."
    )
    date_hierarchy = "queued_at"
    ordering = ("-queued_at", "position")
    show_full_result_count = False
    fieldsets = (
        (None, {"fields": ("name", "of", "owner", "host", "gpus_given", "parent", "job_id", "directory")}),
        ("Wanted", {"fields": ("stop_requested", "attempt", "gpus_wanted")}),
        (
            "Known",
            {"fields": ("status", "reason", "what_happened", "progress", "tokens", "flops_done", "train_seconds")},
        ),
        (
            "Figures",
            {"fields": ("train_cross_entropy", "validation_cross_entropy", "test_cross_entropy", "parameters")},
        ),
        ("Resources", {"fields": ("tokens_per_second", "peak_memory", "disk")}),
        ("Times", {"fields": ("queued_at", "started_at", "ended_at", "last_event_at", "last_seen")}),
        ("Stream", {"classes": ("collapse",), "fields": ("offset", "last_seq", "recent", "prepared_with", "growth")}),
    )

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False  # a run goes with its experiment

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> list[str]:
        return [
            str(field) for _, section in self.fieldsets for field in section["fields"]
        ]  # the follower writes them all

    def change_view(self, request: HttpRequest, object_id: str, form_url: str = "", extra_context: Any = None) -> Any:
        nothing_to_save = {"show_save": False, "show_save_and_continue": False, "show_save_and_add_another": False}
        return super().change_view(request, object_id, form_url, (extra_context or {}) | nothing_to_save)

    @admin.display(description="experiment", ordering="experiment__name")
    def of(self, run: ModelRun) -> SafeString:
        address = reverse("admin:experiments_experiment_change", args=[run.experiment_id])
        return format_html('<a href="{}">{}</a>', address, run.experiment.name)

    @admin.display(ordering="experiment__owner__email")
    def owner(self, run: ModelRun) -> Any:
        return run.experiment.owner

    @admin.display(description="GPUs")
    def gpus_given(self, run: ModelRun) -> str:
        return ", ".join(map(str, run.gpus)) or "–"

    @admin.display(description="state", ordering="state")
    def status(self, run: ModelRun) -> SafeString:
        return _run_state(run)

    @admin.display(description="step", ordering="step")
    def progress(self, run: ModelRun) -> str:
        return _progress(run)

    @admin.display(description="detail")
    def what_happened(self, run: ModelRun) -> SafeString:
        return format_html('<pre class="json">{}</pre>', run.detail) if run.detail else SafeString("–")

    @admin.display(description="FLOPs")
    def flops_done(self, run: ModelRun) -> str:
        return figures.flops(run.flops)

    @admin.display(description="peak memory")
    def peak_memory(self, run: ModelRun) -> str:
        return figures.filesize_short(run.peak_memory_bytes)

    @admin.display(description="disk")
    def disk(self, run: ModelRun) -> str:
        return figures.filesize_short(run.disk_bytes)

    @admin.display(description="newest events")
    def recent(self, run: ModelRun) -> SafeString:
        return _pretty([{"seq": n.seq, "kind": n.kind, **n.data} for n in run.notes.order_by("-seq")[:20]])

    @admin.display(description="prepared")
    def prepared_with(self, run: ModelRun) -> SafeString:
        return _pretty(run.prepared)

    @admin.display(description="growth at step 0")
    def growth(self, run: ModelRun) -> SafeString:
        return _pretty(run.grown)


@admin.register(Growth)
class GrowthAdmin(Actions):
    """Checkpoints grown by themselves: shown, stopped, put in line again, deleted."""

    list_display = ("name", "owner", "status", "reason", "source_name", "disk", "attempt", "created", "ended_at")
    list_filter = ("state", "reason", "created")
    list_select_related = ("owner",)
    list_per_page = 50
    search_fields = ("=id", "name", "source_name", "owner__email", "owner__name", "detail")
    date_hierarchy = "created"
    show_full_result_count = False
    fieldsets = (
        (None, {"fields": ("name", "id", "owner", "source_name", "source", "source_run", "directory", "job_id")}),
        ("Wanted", {"fields": ("plan_shown", "seed", "dtype", "measures", "stop_requested", "attempt")}),
        ("Known", {"fields": ("status", "reason", "what_happened", "phase", "bytes_done", "bytes_total", "disk")}),
        ("Times", {"fields": ("created", "queued_at", "started_at", "ended_at", "last_seen")}),
        ("Certificate", {"classes": ("collapse",), "fields": ("found",)}),
    )

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        queryset: QuerySet[Any] = super().get_queryset(request)
        return queryset.defer("certificate")

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> list[str]:
        return [str(field) for _, section in self.fieldsets for field in section["fields"]]

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False  # the Grow page checks what is asked for; here nothing would

    @admin.action(description="Cancel: end, and keep nothing", permissions=["change"])
    def stop(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        active = [growth for growth in queryset if growth.is_active]
        for growth in active:
            growths.request_stop(growth)
        self._say(request, len(active), "asked to end")

    @admin.action(description="Try again what failed or was cancelled", permissions=["change"])
    def resume(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        ended = [growth for growth in queryset if growth.is_resumable]
        self._for_each(request, ended, growths.retry, "{runs} queued again.", "None of these can be tried again.")

    @admin.action(description="Requeue: a queue job for what waits or grows without one", permissions=["change"])
    def requeue(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        growths.reconcile()
        self._say(request, queryset.filter(state__in=ACTIVE).count(), "looked after")

    def _say(self, request: HttpRequest, count: int, done: str) -> None:
        said = f"{count} of them {done}." if count else "None of these waits or grows."
        self.message_user(request, said, messages.INFO if count else messages.WARNING)

    @admin.display(description="state", ordering="state")
    def status(self, growth: Growth) -> SafeString:
        return _state(growth.state, growth.get_state_display())

    @admin.display(description="detail")
    def what_happened(self, growth: Growth) -> SafeString:
        return format_html('<pre class="json">{}</pre>', growth.detail) if growth.detail else SafeString("–")

    @admin.display(description="disk", ordering="disk_bytes")
    def disk(self, growth: Growth) -> str:
        return figures.filesize_short(growth.disk_bytes)

    @admin.display(description="plan")
    def plan_shown(self, growth: Growth) -> SafeString:
        return _pretty(growth.planned)

    @admin.display(description="certificate")
    def found(self, growth: Growth) -> SafeString:
        return _pretty(growth.certificate)


class Shown(admin.ModelAdmin):  # type: ignore[type-arg]
    """Rows of the collector's: to be looked at."""

    list_per_page = 50
    show_full_result_count = False

    class Media:
        css = {"all": ["css/admin.css"]}

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False


class HostKeyPinInline(ShownInline):
    """Who trusted which key, and when."""

    model = HostKeyPin
    verbose_name_plural = "confirmed host keys"
    fields = readonly_fields = ("at", "by", "confirmed", "before")

    @admin.display(description="key")
    def confirmed(self, pin: HostKeyPin) -> str:
        return _fingerprint(pin.key)

    @admin.display(description="before")
    def before(self, pin: HostKeyPin) -> str:
        return _fingerprint(pin.previous)


class HostTaskInline(ShownInline):
    model = HostTask
    fields = readonly_fields = ("task", "state", "asked_by", "created", "ended_at")

    @admin.display(description="what")
    def task(self, task: HostTask) -> SafeString:
        address = reverse("admin:experiments_hosttask_change", args=[task.pk])
        return format_html('<a href="{}">{}</a>', address, task.get_kind_display())


_REACHED = (
    (None, {"fields": ("name", "kind", "owner", "where", "state", "offered", "retired_at")}),
    ("Trust", {"fields": ("fingerprint", "seen_fingerprint", "credential", "credential_changed")}),
    ("Use", {"fields": ("folder", "env_python", "gpus", "gpu_choice", "runs_per_gpu", "slots", "price_per_hour")}),
    ("Known", {"fields": ("last_seen", "unreachable_since", "problem", "problem_text", "probed_at", "found")}),
)


@admin.register(Host)
class HostAdmin(admin.ModelAdmin):  # type: ignore[type-arg]
    list_display = ("name", "owner", "where", "state", "gpus", "training", "waiting", "offered", "last_seen")
    list_filter = ("kind", "offered", "problem", ("retired_at", admin.EmptyFieldListFilter))
    list_select_related = ("owner",)
    list_per_page = 50
    search_fields = ("name", "address", "owner__email")
    search_help_text = "Name, address, or the owner's address."
    show_full_result_count = False
    view_on_site = False  # its pages are its owner's
    actions = ("offer", "take_back", "retire")

    class Media:
        css = {"all": ["css/admin.css"]}

    def get_queryset(self, request: HttpRequest) -> QuerySet[Host]:
        queryset: QuerySet[Host] = super().get_queryset(request)
        return queryset.annotate(
            n_training=Count("runs", filter=Q(runs__state=State.RUNNING), distinct=True),
            n_waiting=Count("runs", filter=Q(runs__state=State.QUEUED), distinct=True),
        )

    def get_fieldsets(self, request: HttpRequest, obj: Any = None) -> Any:
        if obj is not None and obj.is_remote:
            return _REACHED
        return ((None, {"fields": ("name", "slots", "kind", "created", "last_seen")}),)

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> Any:
        if obj is None or not obj.is_remote:
            return ("kind", "created", "last_seen")
        fields = [field for _, section in _REACHED for field in section["fields"]]
        return [field for field in fields if field != "offered" or obj.retired_at]

    def get_inlines(self, request: HttpRequest, obj: Any = None) -> Any:
        return (HostKeyPinInline, HostTaskInline) if obj is not None and obj.is_remote else ()

    def save_model(self, request: HttpRequest, obj: Host, form: Any, change: bool) -> None:
        """What was changed here and no more: the collector writes to the same row."""
        obj.save(update_fields=form.changed_data)

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False  # this machine is there by itself, others are added by who may sign in there

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """A machine that is reached over SSH is retired: what Kangaroo left there is removed before it is forgotten."""
        return super().has_delete_permission(request, obj) and (obj is None or not obj.is_remote)

    def get_actions(self, request: HttpRequest) -> Any:
        return {name: action for name, action in super().get_actions(request).items() if name != "delete_selected"}

    @admin.action(description="Offer to all users", permissions=["change"])
    def offer(self, request: HttpRequest, queryset: QuerySet[Host]) -> None:
        self._change(request, queryset, "Offered to all", offered=True)

    @admin.action(description="Offer no longer", permissions=["change"])
    def take_back(self, request: HttpRequest, queryset: QuerySet[Host]) -> None:
        self._change(request, queryset, "Its owner's alone now", offered=False)

    @admin.action(description="Retire: nothing new begins there", permissions=["change"])
    def retire(self, request: HttpRequest, queryset: QuerySet[Host]) -> None:
        """The collector clears up there and then forgets what opened it."""
        self._change(request, queryset, "Retired", offered=False, retired_at=timezone.now())

    def _change(self, request: HttpRequest, queryset: QuerySet[Host], done: str, **fields: Any) -> None:
        for host in queryset:
            why = _hindrance(host, retire="retired_at" in fields)
            if not why:
                Host.objects.filter(pk=host.pk, retired_at=None).update(**fields)
                self.log_change(request, host, f"{done}.")
            said = f"Nothing was done with {host}: {why}." if why else f"{done}: {host}."
            self.message_user(request, said, messages.WARNING if why else messages.INFO)

    @admin.display(ordering="address")
    def where(self, host: Host) -> str:
        return f"{host.username}@{host.address}:{host.port}" if host.is_remote else "–"

    @admin.display
    def state(self, host: Host) -> SafeString:
        if host.retired_at:
            return _state("cancelled", "retired")
        if not host.is_remote:
            return SafeString("–")
        state = HostStanding(host, is_mine=True).state
        since = f" since {timezone.localtime(host.unreachable_since):%Y-%m-%d %H:%M}" if host.unreachable_since else ""
        return _state(state.colour, f"{state.word}{since if state.word == 'unreachable' else ''}")

    @admin.display(description="GPUs")
    def gpus(self, host: Host) -> str:
        names = [gpu.name for gpu in HostStanding(host, is_mine=True).gpus]
        return ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names)) or "–"

    @admin.display(ordering="n_training")
    def training(self, host: Any) -> int:
        return int(host.n_training)

    @admin.display(ordering="n_waiting")
    def waiting(self, host: Any) -> int:
        return int(host.n_waiting)

    @admin.display(description="host key")
    def fingerprint(self, host: Host) -> str:
        return _fingerprint(host.host_key)

    @admin.display(description="another key that was seen")
    def seen_fingerprint(self, host: Host) -> str:
        return _fingerprint(host.seen_key if host.seen_key != host.host_key else "")

    @admin.display(description="what the last look found")
    def found(self, host: Host) -> SafeString:
        return _pretty(host.facts)


def _fingerprint(key_line: str) -> str:
    try:
        return f"{key_line.split()[0]} {credentials.fingerprint(key_line)}" if key_line else "–"
    except ValueError:
        return "not a key"


def _hindrance(host: Host, *, retire: bool) -> str:
    """Why it cannot be offered, or retired; "" if it can."""
    if not host.is_remote:
        return "it belongs to this installation"
    if host.retired_at:
        return "it is retired"
    if retire and (active := host.runs.filter(state__in=ACTIVE).count()):
        return f"{'1 run waits or trains' if active == 1 else f'{active} runs wait or train'} there; stop them first"
    if retire and (other := host.reached_through_it.filter(retired_at=None).first()):
        return f"{other} is reached through it"
    return ""


@admin.register(HostTask)
class HostTaskAdmin(Shown):
    list_display = ("host", "kind", "status", "asked_by", "created", "ended_at")
    list_filter = ("kind", "state", "created")
    list_select_related = ("host", "asked_by")
    search_fields = ("host__name", "host__address", "asked_by__email")
    fields = (
        "host",
        "kind",
        "status",
        "asked_by",
        "created",
        "started_at",
        "ended_at",
        "cancel_requested",
        "done",
        "said",
    )

    @admin.display(description="state", ordering="state")
    def status(self, task: HostTask) -> SafeString:
        colour = "queued" if task.state == HostTask.State.WANTED else task.state
        return _state(colour, task.get_state_display())

    @admin.display(description="steps")
    def done(self, task: HostTask) -> SafeString:
        return _pretty(task.steps)

    @admin.display(description="log")
    def said(self, task: HostTask) -> SafeString:
        return format_html('<pre class="json">{}</pre>', task.log[-20_000:]) if task.log else SafeString("–")


@admin.register(Transfer)
class TransferAdmin(Shown):
    list_display = ("run", "name", "state", "bytes_done", "bytes_total", "created", "ended_at")
    list_filter = ("state", "run__host", "created")
    list_select_related = ("run__experiment",)
    search_fields = ("run__experiment__name", "=run__experiment__id", "error")
    fields = ("run", "name", "state", "bytes_done", "bytes_total", "error", "created", "ended_at")


@admin.register(Removal)
class RemovalAdmin(Shown):
    list_display = ("experiment_id", "host", "created")
    list_filter = ("host",)
    list_select_related = ("host",)
    search_fields = ("=experiment_id", "host__name")
    fields = ("experiment_id", "host", "created")
