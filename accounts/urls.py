"""The site map of accounts: allauth's pages, and our own beside them."""

from django.urls import include, path

from accounts import views

urlpatterns = [
    path("settings/", views.settings, name="account_settings"),
    path("", include("allauth.account.urls")),
]
