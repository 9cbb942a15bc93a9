"""The site map of accounts: allauth's pages, and our own beside them."""

from allauth.account import views as allauth_views
from allauth.mfa.base import views as factor_views
from allauth.mfa.recovery_codes import views as code_views
from allauth.mfa.totp import views as totp_views
from allauth.mfa.webauthn import views as passkey_views
from allauth.usersessions import views as session_views
from django.urls import include, path
from django.views.decorators.cache import never_cache
from django.views.generic import RedirectView

from accounts import views

# Each of allauth's pages of the second factor, by name: what a later version adds comes here when somebody has read it.
second_factor = [
    path("", RedirectView.as_view(pattern_name="account_settings"), name="mfa_index"),
    path("authenticate/", views.guest_as_stranger(factor_views.authenticate), name="mfa_authenticate"),
    path("reauthenticate/", views.members_only(factor_views.reauthenticate), name="mfa_reauthenticate"),
    path("app/activate/", views.members_only(never_cache(totp_views.activate_totp)), name="mfa_activate_totp"),
    path("app/deactivate/", views.members_only(totp_views.deactivate_totp), name="mfa_deactivate_totp"),
    path("codes/", views.members_only(never_cache(code_views.view_recovery_codes)), name="mfa_view_recovery_codes"),
    path("codes/new/", views.members_only(code_views.generate_recovery_codes), name="mfa_generate_recovery_codes"),
    path("codes/download/", views.members_only(code_views.download_recovery_codes), name="mfa_download_recovery_codes"),
    path("passkeys/", views.members_only(passkey_views.list_webauthn), name="mfa_list_webauthn"),
    path("passkeys/add/", views.members_only(passkey_views.add_webauthn), name="mfa_add_webauthn"),
    path("passkeys/<int:pk>/rename/", views.members_only(passkey_views.edit_webauthn), name="mfa_edit_webauthn"),
    path("passkeys/<int:pk>/remove/", views.members_only(passkey_views.remove_webauthn), name="mfa_remove_webauthn"),
    path("passkeys/login/", passkey_views.login_webauthn, name="mfa_login_webauthn"),
    path(
        "passkeys/reauthenticate/",
        views.members_only(passkey_views.reauthenticate_webauthn),
        name="mfa_reauthenticate_webauthn",
    ),
]
urlpatterns = [
    path("settings/", views.settings, name="account_settings"),
    path("delete/", views.delete, name="account_delete"),
    path("second-factor/", include(second_factor)),
    path("sessions/", views.members_only(session_views.list_usersessions), name="usersessions_list"),
    # allauth's own routes again, closed to guests; the first match counts.
    path("email/", views.members_only(allauth_views.email), name="account_email"),
    path("password/change/", views.members_only(allauth_views.password_change), name="account_change_password"),
    path("password/set/", views.members_only(allauth_views.password_set), name="account_set_password"),
    path("reauthenticate/", views.members_only(allauth_views.reauthenticate), name="account_reauthenticate"),
    path("", include("allauth.account.urls")),
]
