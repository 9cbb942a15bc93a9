"""People. They sign in by e-mail; a guest is a real row without one, so that guest work has an owner from the start."""

from __future__ import annotations

from typing import Any, ClassVar

from django.contrib.auth.models import AbstractUser
from django.contrib.auth.models import UserManager as DjangoUserManager
from django.db import models


class UserManager(DjangoUserManager["User"]):
    def create_user(self, email: str | None = None, password: str | None = None, **fields: Any) -> User:  # type: ignore[override]
        user = self.model(email=self.normalize_email(email).lower() if email else None, **fields)
        user.set_password(password)
        user.save(using=self._db)
        return user

    def create_superuser(self, email: str, password: str | None = None, **fields: Any) -> User:  # type: ignore[override]
        return self.create_user(email, password, is_staff=True, is_superuser=True, **fields)

    def create_guest(self) -> User:
        return self.create_user(is_guest=True)


class User(AbstractUser):
    username = None  # type: ignore[assignment]
    first_name = None  # type: ignore[assignment]
    last_name = None  # type: ignore[assignment]
    email = models.EmailField("e-mail address", unique=True, null=True, blank=True)  # type: ignore[assignment]
    name = models.CharField(max_length=120, blank=True)
    is_guest = models.BooleanField(default=False)
    last_active = models.DateTimeField(auto_now_add=True, help_text="Guests are purged when idle for long.")

    objects: ClassVar[UserManager] = UserManager()

    USERNAME_FIELD = "email"
    REQUIRED_FIELDS: ClassVar[list[str]] = []

    def __str__(self) -> str:
        return self.name or self.email or f"guest {self.pk}"

    def clean(self) -> None:
        super().clean()  # which writes "" for no address, and a second guest could not have that
        self.email = self.email.lower() if self.email else None

    def get_full_name(self) -> str:
        return str(self)

    def get_short_name(self) -> str:
        return str(self)
