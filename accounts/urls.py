"""The site map of accounts: allauth's pages, and our own beside them."""

from allauth.account import views as allauth_views
from django.urls import include, path

from accounts import views

urlpatterns = [
    path("settings/", views.settings, name="account_settings"),
    path("delete/", views.delete, name="account_delete"),
    # allauth's own routes again, closed to guests; the first match counts.
    path("email/", views.members_only(allauth_views.email), name="account_email"),
    path("password/change/", views.members_only(allauth_views.password_change), name="account_change_password"),
    path("password/set/", views.members_only(allauth_views.password_set), name="account_set_password"),
    path("reauthenticate/", views.members_only(allauth_views.reauthenticate), name="account_reauthenticate"),
    path("", include("allauth.account.urls")),
]
