"""Routes of the whole site."""

from allauth.account.decorators import secure_admin_login
from django.contrib import admin
from django.urls import include, path

admin.site.site_header = admin.site.site_title = "Kangaroo"
# Through the site's own sign-in, whose limits Django's does not have.
admin.site.login = secure_admin_login(admin.site.login)  # type: ignore[method-assign]

urlpatterns = [
    path("", include("experiments.urls")),
    path("accounts/", include("accounts.urls")),
    path("admin/", admin.site.urls),
]
