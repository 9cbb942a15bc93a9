"""The administrator's view of people."""

from __future__ import annotations

from typing import Any

import allauth.mfa.admin
import allauth.usersessions.admin  # noqa: F401  both registered, to be replaced here
from allauth.mfa.models import Authenticator
from allauth.usersessions.models import UserSession
from django.contrib import admin, messages
from django.contrib.auth.admin import UserAdmin as DjangoUserAdmin
from django.contrib.auth.forms import AdminUserCreationForm, UserChangeForm
from django.db.models import Exists, OuterRef, QuerySet
from django.http import HttpRequest

from accounts import second_factor
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
    list_display = (
        "email_or_guest",
        "name",
        "is_guest",
        "has_second_factor",
        "is_staff",
        "is_active",
        "last_active",
        "date_joined",
    )
    actions = ("remove_second_factor",)
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

    def get_queryset(self, request: HttpRequest) -> QuerySet[User]:
        factors = Authenticator.objects.filter(user=OuterRef("pk"))
        users: QuerySet[User] = super().get_queryset(request)
        return users.annotate(second_factor=Exists(factors))

    @admin.display(description="second factor", boolean=True, ordering="second_factor")
    def has_second_factor(self, user: User) -> bool:
        return bool(user.second_factor)  # type: ignore[attr-defined]

    @admin.action(description="Remove the second factor: app, passkeys and recovery codes", permissions=["change"])
    def remove_second_factor(self, request: HttpRequest, users: QuerySet[User]) -> None:
        """For somebody who lost theirs. Make sure first that it is really them who ask."""
        removed = [user for user in users if second_factor.remove(user)]
        for user in removed:
            self.log_change(request, user, "Second factor removed.")
        self.message_user(
            request,
            f"Removed from {', '.join(map(str, removed))}: the password alone signs in again."
            if removed
            else "None of them had a second factor.",
            messages.INFO,
        )

    @admin.display(description="who", ordering="email")
    def email_or_guest(self, user: User) -> str:
        return user.email or f"guest {user.pk}"

    def get_deleted_objects(
        self, objs: Any, request: HttpRequest
    ) -> tuple[list[Any], dict[str, int], set[str], list[Any]]:
        """What goes, in a line each; everything that belongs to a user goes with them."""
        lines = [f"{user}: the account and everything that belongs to it" for user in objs]
        return lines, {"users": len(lines)}, set(), []


class ReadOnlyAdmin(admin.ModelAdmin):  # type: ignore[type-arg]
    """To be looked at and removed, never written by hand."""

    list_select_related = ("user",)
    show_full_result_count = False

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False


admin.site.unregister([Authenticator, UserSession])


@admin.register(Authenticator)
class AuthenticatorAdmin(ReadOnlyAdmin):
    """What there is, without its secrets. The action on users takes it away, and leaves no stray recovery codes."""

    list_display = ("user", "type", "__str__", "created_at", "last_used_at")
    list_filter = ("type", "created_at", "last_used_at")
    search_fields = ("user__email",)
    fields = ("user", "type", "created_at", "last_used_at")

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False


@admin.register(UserSession)
class UserSessionAdmin(ReadOnlyAdmin):
    """Where people are signed in. Deleting one signs it out."""

    list_display = ("user", "user_agent", "ip", "created_at", "last_seen_at")
    list_filter = ("last_seen_at",)
    search_fields = ("user__email", "ip")
    fields = ("user", "user_agent", "ip", "created_at", "last_seen_at")

    def delete_model(self, request: HttpRequest, session: UserSession) -> None:
        session.end()

    def delete_queryset(self, request: HttpRequest, sessions: QuerySet[Any]) -> None:
        for session in sessions:
            session.end()
