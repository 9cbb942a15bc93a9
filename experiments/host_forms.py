"""The forms of the Hosts pages: where a machine is and how it is used, what shows that it is the right one, the way in.

What is wrong stands beside its field: what was given, and what would be right. Nothing typed is lost, save secrets:
those are never shown again, whatever else was wrong.
"""

from __future__ import annotations

import ipaddress
import re
from decimal import Decimal
from typing import Any

from django import forms
from django.conf import settings
from django.core.exceptions import ValidationError

from accounts.models import User
from experiments import credentials
from experiments.models import ACTIVE, Host

#: Beyond that it is no private key; nothing longer is read.
MOST_KEY_BYTES = 32_000
#: Characters of the new fingerprint that are typed to accept a changed host key.
TYPED = 4

# Where it is and how it is used ---------------------------------------------------------------------------------------

_PLAIN = {"autocomplete": "off", "spellcheck": "false", "autocapitalize": "off"}


def _whole(label: str, least: int, most: int) -> dict[str, str]:
    """The same sentence, whatever is wrong with a number."""
    said = f"{label}: must be a whole number from {least} to {most}."
    return dict.fromkeys(("invalid", "min_value", "max_value"), said)


class HostForm(forms.ModelForm):  # type: ignore[type-arg]  # generic for the type checker alone
    """Where a machine is and what Kangaroo does there."""

    #: What is asked first; the rest is folded.
    FIRST = ("name", "address", "port", "username")
    #: Another connection is needed after a change of these.
    CONNECTION = frozenset({"address", "port", "username", "jump", "folder", "python", "before"})
    #: Another machine may answer after a change of these: its key must be confirmed anew.
    PLACE = frozenset({"address", "port"})

    use_required_attribute = False  # the browser's own bubbles would hide all errors but the first

    class Meta:
        model = Host
        fields = (
            "name",
            "address",
            "port",
            "username",
            "jump",
            "folder",
            "python",
            "gpu_choice",
            "before",
            "runs_per_gpu",
            "slots",
            "price_per_hour",
        )
        labels = {
            "name": "Name",
            "address": "Address",
            "port": "Port",
            "username": "User",
            "jump": "Jump host",
            "folder": "Working folder",
            "python": "Python",
            "before": "Lines to run before",
            "price_per_hour": "Price an hour",
            "slots": "Runs at once, without a GPU",
            "gpu_choice": "GPUs to use",
            "runs_per_gpu": "Runs a GPU",
        }
        help_texts = {
            "name": "What you call it here.",
            "address": "A name or an IP address, such as gpu1.example.org or 192.0.2.7.",
            "port": "Mostly 22.",
            "username": "Who you are on that machine. Not root: nothing here needs it.",
            "jump": "Only if the machine is reached through another one, which you have added here before.",
            "folder": "Everything that Kangaroo writes there stands in it. From your home, or absolute.",
            "python": "Empty: the newest that is found. A path, such as /opt/python3.12/bin/python3.",
            "before": "A line each, run by bash before anything else there: module load cuda, conda activate work.",
            "price_per_hour": "In whatever currency you think in; experiments then say what they cost.",
            "slots": "How many runs train there at the same time when it has no GPU.",
            "gpu_choice": "Their numbers, such as 0,1. Empty: all.",
            "runs_per_gpu": "1 gives each run a GPU of its own.",
        }
        widgets = {
            "name": forms.TextInput(attrs={"autocomplete": "off"}),
            "address": forms.TextInput(attrs=_PLAIN),
            "port": forms.TextInput(attrs={**_PLAIN, "inputmode": "numeric"}),
            "username": forms.TextInput(attrs=_PLAIN),
            "folder": forms.TextInput(attrs=_PLAIN),
            "python": forms.TextInput(attrs=_PLAIN),
            "before": forms.Textarea(attrs={**_PLAIN, "rows": 3}),
            "price_per_hour": forms.TextInput(attrs={**_PLAIN, "inputmode": "decimal"}),
            "slots": forms.TextInput(attrs={**_PLAIN, "inputmode": "numeric"}),
            "gpu_choice": forms.TextInput(attrs=_PLAIN),
            "runs_per_gpu": forms.TextInput(attrs={**_PLAIN, "inputmode": "numeric"}),
        }
        error_messages = {
            "name": {"required": "Name: give it one, such as gpu1."},
            "address": {"required": "Address: say where the machine is, such as gpu1.example.org."},
            "username": {"required": "User: say who you are on that machine, such as ada."},
            "price_per_hour": {"invalid": "Price an hour: must be a number, such as 1.20."},
            "jump": {"invalid_choice": "Jump host: must be one of your confirmed machines."},
            "port": _whole("Port", 1, 65535),
            "slots": _whole("Runs at once, without a GPU", 1, 64),
            "runs_per_gpu": _whole("Runs a GPU", 1, 16),
        }

    def __init__(self, *args: Any, owner: User, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.owner = owner
        for name in ("address", "username"):
            self.fields[name].required = True
        for name in ("port", "slots", "runs_per_gpu", "folder"):
            self.fields[name].required = False  # emptied: as it was at first
        jump = self.fields["jump"]
        assert isinstance(jump, forms.ModelChoiceField)
        jump.queryset = self._possible_jumps()
        jump.empty_label = "none: it is reached directly"

    def _possible_jumps(self) -> Any:
        """The owner's confirmed machines that are reached directly: a jump is one machine, not a journey."""
        if self.instance.pk and self.instance.reached_through_it.filter(retired_at=None).exists():
            return Host.objects.none()
        possible = Host.objects.owned_by(self.owner).filter(jump=None).exclude(host_key="")
        return possible.exclude(pk=self.instance.pk)

    @property
    def first(self) -> list[forms.BoundField]:
        return [self[name] for name in self.FIRST]

    @property
    def folded(self) -> list[forms.BoundField]:
        return [self[name] for name in self.fields if name not in self.FIRST]

    @property
    def opens_fold(self) -> bool:
        """Whether something in there wants to be seen."""
        return any(field.errors for field in self.folded)

    def clean(self) -> dict[str, Any]:
        cleaned: dict[str, Any] = super().clean() or {}
        most = settings.MAX_HOSTS_PER_USER
        if most and self.instance.pk is None and Host.objects.owned_by(self.owner).count() >= most:
            raise ValidationError(f"You have {most} machines here, which is what is allowed. Delete one first.")
        return cleaned

    def clean_name(self) -> str:
        name = _one_line("Name", self.cleaned_data["name"])
        others = Host.objects.filter(owner=self.owner, name=name, retired_at=None).exclude(pk=self.instance.pk)
        if others.exists():
            raise ValidationError(f"Name {name}: you have a machine of this name already.")
        return name

    def clean_address(self) -> str:
        address = _one_line("Address", self.cleaned_data["address"])
        if "://" in address or "/" in address:
            raise ValidationError(f"Address {address}: must be a machine's name or IP address, not a web address.")
        if "@" in address:
            raise ValidationError(f"Address {address}: the user has a field of its own; leave what is behind the @.")
        if " " in address:
            raise ValidationError(f"Address {address}: must be one name or IP address, without the ssh command.")
        bare = address.removeprefix("[").removesuffix("]")
        try:
            return str(ipaddress.ip_address(bare))
        except ValueError:
            pass
        if ":" in address:
            raise ValidationError(
                f"Address {address}: the port has a field of its own; leave what is before the colon."
            )
        if not re.fullmatch(r"(?!-)[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\.?", address):
            raise ValidationError(f"Address {address}: must be a name such as gpu1.example.org, or an IP address.")
        return address.rstrip(".").lower()

    def clean_username(self) -> str:
        user = _one_line("User", self.cleaned_data["username"])
        if not re.fullmatch(r"[^\s:/-][^\s:/]*", user):
            raise ValidationError(f"User {user}: must be a name as `whoami` prints it there.")
        return user

    def clean_port(self) -> Any:
        return self._or_default("port")

    def clean_slots(self) -> Any:
        return self._or_default("slots")

    def clean_runs_per_gpu(self) -> Any:
        return self._or_default("runs_per_gpu")

    def _or_default(self, name: str) -> Any:
        value = self.cleaned_data[name]
        return getattr(Host(), name) if value in (None, "") else value

    def clean_folder(self) -> str:
        folder = _one_line("Working folder", self._or_default("folder")).rstrip("/")
        parts = folder.split("/")
        if ".." in parts or folder in ("", "~", ".") or (folder.startswith("~") and not folder.startswith("~/")):
            raise ValidationError(f"Working folder {folder or '/'}: must be a folder of its own, such as kangaroo.")
        if folder != self.instance.folder and self._has_active_runs():
            raise ValidationError("Working folder: runs are active in it; change it when they have ended.")
        return folder

    def _has_active_runs(self) -> bool:
        return bool(self.instance.pk) and self.instance.runs.filter(state__in=ACTIVE).exists()

    def clean_python(self) -> str:
        return interpreter(self.cleaned_data["python"], "Python")

    def clean_before(self) -> str:
        before: str = self.cleaned_data["before"].replace("\r\n", "\n").strip("\n")
        if any(not c.isprintable() and c not in "\n\t" for c in before):
            raise ValidationError("Lines to run before: hold a character that cannot be typed in a shell.")
        return before

    def clean_price_per_hour(self) -> Decimal | None:
        price: Decimal | None = self.cleaned_data["price_per_hour"]
        if price is not None and price < 0:
            raise ValidationError(f"Price an hour {price}: must not be below 0.")
        return price

    def clean_gpu_choice(self) -> str:
        choice = re.sub(r"\s", "", self.cleaned_data["gpu_choice"])
        if choice and not re.fullmatch(r"\d{1,3}(,\d{1,3})*", choice):
            raise ValidationError(f"GPUs to use {choice}: must be their numbers with commas between, such as 0,1.")
        numbers = sorted({int(number) for number in choice.split(",") if number})
        return ",".join(map(str, numbers))


def _one_line(label: str, value: str) -> str:
    value = value.strip()
    if any(not c.isprintable() for c in value):
        raise ValidationError(f"{label}: must be one line of printable characters.")
    return value


def interpreter(value: str, label: str) -> str:
    """A Python on the machine: a path, or a name to be looked for. Empty stays empty."""
    value = _one_line(label, value)
    if value and not re.fullmatch(r"[A-Za-z0-9_.][A-Za-z0-9_.+-]*|~?/.+", value):
        raise ValidationError(f"{label} {value}: must be a path such as /opt/python3.12/bin/python3.")
    return value


# Is it the right machine ----------------------------------------------------------------------------------------------


class ConfirmForm(forms.Form):
    """Somebody compared the fingerprint that the page showed. A key that takes another's place asks for more."""

    fingerprint = forms.CharField(widget=forms.HiddenInput)
    typed = forms.CharField(
        required=False,
        label="The last four characters of the new fingerprint",
        widget=forms.TextInput(attrs={**_PLAIN, "size": 12, "maxlength": 60}),
    )

    def __init__(self, *args: Any, host: Host, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.host = host
        self.seen_line = host.seen_key if host.seen_key != host.host_key else ""
        self.seen = credentials.fingerprint(self.seen_line) if self.seen_line else ""
        if not self.is_bound:
            self.initial["fingerprint"] = self.seen

    @property
    def replaces(self) -> bool:
        """Whether another key is trusted until now."""
        return bool(self.host.host_key and self.seen_line)

    def clean_fingerprint(self) -> str:
        shown: str = self.cleaned_data["fingerprint"]
        if not self.seen or shown != self.seen:
            raise ValidationError("The machine was asked again meanwhile and showed another key: compare this one.")
        return shown

    def clean_typed(self) -> str:
        typed: str = self.cleaned_data["typed"].strip()
        if self.replaces and not (len(typed) >= TYPED and self.seen.endswith(typed)):
            raise ValidationError(
                f"{typed or 'Nothing'}: must be the last {TYPED} characters of the new fingerprint, in the same small "
                "and capital letters."
            )
        return typed


# The way in -----------------------------------------------------------------------------------------------------------


class PasswordForm(forms.Form):
    """The password of the user there, for one login."""

    password = forms.CharField(
        label="Password on that machine",
        strip=False,
        max_length=1000,
        widget=forms.PasswordInput(render_value=False, attrs={"autocomplete": "off"}),
        error_messages={"required": "Password: type the one that you sign in with there."},
    )
    use_required_attribute = False


class OwnKeyForm(forms.Form):
    """A private key that its owner has already, pasted or as a file. `pair` is what came of it."""

    use_required_attribute = False
    private_key = forms.CharField(
        label="Private key",
        required=False,
        max_length=MOST_KEY_BYTES,
        widget=forms.Textarea(attrs={**_PLAIN, "rows": 4, "placeholder": "-----BEGIN OPENSSH PRIVATE KEY-----"}),
        help_text="The whole file, such as ~/.ssh/id_ed25519, with its first and last line.",
    )
    file = forms.FileField(
        label="Or the file itself",
        required=False,
        allow_empty_file=True,
        widget=forms.FileInput(),
    )
    passphrase = forms.CharField(
        label="Passphrase",
        required=False,
        strip=False,
        max_length=1000,
        widget=forms.PasswordInput(render_value=False, attrs={"autocomplete": "off"}),
        help_text="Empty if the key has none.",
    )

    pair: tuple[str, str]

    def clean(self) -> dict[str, Any]:
        cleaned: dict[str, Any] = super().clean() or {}
        text, file = cleaned.get("private_key", ""), cleaned.get("file")
        if file is not None and not self.errors:
            if file.size > MOST_KEY_BYTES:
                self.add_error("file", "The file is too long to be a private key.")
                return cleaned
            text = file.read().decode("utf-8", errors="replace")
        if not self.errors:
            self._read(text, cleaned.get("passphrase", ""))
        return cleaned

    def _read(self, text: str, passphrase: str) -> None:
        if not text.strip():
            self.add_error("private_key", "Private key: paste it, or choose its file.")
            return
        try:
            self.pair = credentials.read_private_key(text, passphrase)
        except ValueError as error:
            # Its sentence names the field that is at fault.
            about = "passphrase" if str(error).lower().startswith("passphrase") else "private_key"
            self.add_error(about, str(error))

    def bare(self) -> OwnKeyForm:
        """This form to be shown again: with what was wrong, and without what was given."""
        shown = OwnKeyForm({})
        shown._errors = self.errors  # type: ignore[attr-defined]
        return shown


# What is done with it -------------------------------------------------------------------------------------------------


class InterpreterForm(forms.Form):
    """An environment that stands there already."""

    python = forms.CharField(
        label="Its Python",
        max_length=300,
        widget=forms.TextInput(attrs=_PLAIN),
        help_text="A path there, such as ~/miniconda3/envs/train/bin/python. It must have torch and transformers.",
        error_messages={"required": "Its Python: give the path of the interpreter there."},
    )
    use_required_attribute = False

    def clean_python(self) -> str:
        python = interpreter(self.cleaned_data["python"], "Its Python")
        if not python.startswith(("/", "~/")):
            raise ValidationError(f"Its Python {python}: must be a whole path, from / or ~/.")
        return python


class DeleteForm(forms.Form):
    """A machine where experiments were trained asks for its name."""

    name = forms.CharField(
        required=False, label="Its name", max_length=80, widget=forms.TextInput(attrs={"autocomplete": "off"})
    )
    use_required_attribute = False

    def __init__(self, *args: Any, host: Host, was_used: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.host, self.was_used = host, was_used

    def clean_name(self) -> str:
        name: str = self.cleaned_data["name"].strip()
        if self.was_used and name != self.host.name:
            raise ValidationError(f"{name or 'Nothing'}: type {self.host.name} to delete this machine.")
        return name
