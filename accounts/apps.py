from django.apps import AppConfig


class AccountsConfig(AppConfig):
    name = "accounts"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        import accounts.middleware  # noqa: F401  its receiver: sessions begin outside requests too
        from accounts import ring, second_factor

        ring.waiting.append(second_factor.waits)
