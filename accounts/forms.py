"""The account page's forms, and allauth's of the second factor in this site's words."""

from __future__ import annotations

from typing import Any, ClassVar

from allauth.mfa.base.forms import AuthenticateForm, ReauthenticateForm
from allauth.mfa.totp.forms import ActivateTOTPForm
from allauth.mfa.webauthn.forms import AddWebAuthnForm, EditWebAuthnForm, LoginWebAuthnForm
from django import forms

from accounts.models import User


class NameForm(forms.ModelForm):  # type: ignore[type-arg]
    class Meta:
        model = User
        fields: ClassVar[list[str]] = ["name"]
        labels: ClassVar[dict[str, str]] = {"name": "Name"}
        help_texts: ClassVar[dict[str, str]] = {"name": "Shown in the header; the e-mail address where there is none."}
        widgets: ClassVar[dict[str, forms.Widget]] = {"name": forms.TextInput(attrs={"autocomplete": "name"})}


class DeleteForm(forms.Form):
    """The password once more; whoever has none (a guest) is not asked for one."""

    password = forms.CharField(
        widget=forms.PasswordInput(attrs={"autocomplete": "current-password"}), strip=False, label="Password"
    )

    def __init__(self, *args: Any, user: User, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.user = user
        if not user.has_usable_password():
            del self.fields["password"]

    def clean_password(self) -> str:
        password: str = self.cleaned_data["password"]
        if not self.user.check_password(password):
            raise forms.ValidationError("This is not the password of this account.")
        return password


def _code(help_text: str) -> forms.CharField:
    keys = {"autocomplete": "one-time-code", "inputmode": "numeric", "autofocus": True}
    return forms.CharField(label="Code", help_text=help_text, max_length=40, widget=forms.TextInput(attrs=keys))


class CodeForm(AuthenticateForm):  # type: ignore[misc]
    """The second step of signing in."""

    code = _code("The six digits that your authenticator app shows, or one of your recovery codes.")


class CodeAgainForm(ReauthenticateForm):  # type: ignore[misc]
    """A code of somebody who is signed in."""

    code = _code("The six digits that your authenticator app shows, or one of your recovery codes.")


class FirstCodeForm(ActivateTOTPForm):  # type: ignore[misc]
    """The code that shows that the app has the secret."""

    code = _code("The six digits that the app shows now.")


class PasskeyLoginForm(LoginWebAuthnForm):  # type: ignore[misc]
    """Signing in with a passkey; allauth would speak of a code that nobody gave."""

    def clean_credential(self) -> Any:
        try:
            return super().clean_credential()
        except forms.ValidationError:
            raise forms.ValidationError(
                "This passkey does not sign in here: it was removed from its account, or the page stood open too long."
            ) from None


class PasskeyForm(AddWebAuthnForm):  # type: ignore[misc]
    """A new passkey. Each of them signs in alone: allauth's other kind, a mere second step, is not offered."""

    name = forms.CharField(
        label="Name", required=False, max_length=60, help_text="To tell it from others: where it is kept, for instance."
    )
    passwordless = forms.BooleanField(widget=forms.CheckboxInput(attrs={"checked": True, "hidden": True}))


class PasskeyNameForm(EditWebAuthnForm):  # type: ignore[misc]
    name = forms.CharField(label="Name", max_length=60)
