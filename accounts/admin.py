"""The administrator's view of people."""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.contrib.auth.admin import UserAdmin as DjangoUserAdmin
from django.contrib.auth.forms import AdminUserCreationForm, UserChangeForm
from django.http import HttpRequest

from accounts.models import User


class CreationForm(AdminUserCreationForm):  # type: ignore[type-arg]
    class Meta:
        model = User
        fields = ("email",)


class ChangeForm(UserChangeForm):  # type: ignore[type-arg]
    class Meta:
        model = User
        fields = "__all__"


@admin.register(User)
class UserAdmin(DjangoUserAdmin):  # type: ignore[type-arg]
    form = ChangeForm
    add_form = CreationForm
    list_display = ("email_or_guest", "name", "is_guest", "is_staff", "is_active", "last_active", "date_joined")
    list_filter = ("is_guest", "is_staff", "is_superuser", "is_active", "last_active", "date_joined")
    search_fields = ("email", "name", "=id")
    search_help_text = "Address, name, or a whole id."
    ordering = ("-last_active",)
    date_hierarchy = "date_joined"
    show_full_result_count = False
    readonly_fields = ("is_guest", "last_active", "last_login", "date_joined")
    fieldsets = (
        (None, {"fields": ("email", "name", "password", "is_guest")}),
        ("May", {"fields": ("is_active", "is_staff", "is_superuser", "groups", "user_permissions")}),
        ("Times", {"fields": ("date_joined", "last_login", "last_active")}),
    )
    add_fieldsets = ((None, {"classes": ("wide",), "fields": ("email", "usable_password", "password1", "password2")}),)

    @admin.display(description="who", ordering="email")
    def email_or_guest(self, user: User) -> str:
        return user.email or f"guest {user.pk}"

    def get_deleted_objects(
        self, objs: Any, request: HttpRequest
    ) -> tuple[list[Any], dict[str, int], set[str], list[Any]]:
        """What goes, in a line each; everything that belongs to a user goes with them."""
        lines = [f"{user}: the account and everything that belongs to it" for user in objs]
        return lines, {"users": len(lines)}, set(), []
