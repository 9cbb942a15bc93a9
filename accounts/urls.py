"""The site map of accounts: allauth's pages, and our own beside them."""

from django.urls import include, path

urlpatterns = [
    path("", include("allauth.account.urls")),
]
