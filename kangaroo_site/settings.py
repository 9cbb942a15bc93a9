"""Settings, all of them, from the environment (or a `.env` file). Each has a default that is safe and works offline.

`var/` beside the checkout (or KANGAROO_VAR) holds everything that this installation makes: database, broker, run
directories, data cache, secret key. `.env.example` lists what can be set.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import sys
import tempfile
from pathlib import Path

from csp.constants import NONE, SELF
from environs import Env

from trainer.agent import cores

BASE_DIR = Path(__file__).resolve().parent.parent
env = Env()
env.read_env(str(BASE_DIR / ".env"), recurse=False)

VAR = Path(env.str("KANGAROO_VAR", str(BASE_DIR / "var"))).resolve()
try:
    VAR.mkdir(parents=True, exist_ok=True)
    if not os.access(VAR, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "Permission denied")
except OSError as error:  # everything else would fail one by one, further from the cause
    sys.exit(
        f"{VAR} cannot be written: {error.strerror}. Give this user write permission there, or set KANGAROO_VAR to a "
        "folder that it may write."
    )


def _kept_secret(name: str) -> str:
    """A secret made once and kept in `var/`, readable by this user alone."""
    path = VAR / name
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_urlsafe(64))
    except FileExistsError:
        pass
    return path.read_text()


def _socket(name: str) -> Path:
    """Where a process of ours listens: in its folder in `var/`, or, where that path is too long, elsewhere."""
    path = VAR / name / f"{name}.sock"
    if len(os.fsencode(path)) <= 103:  # longer paths are refused by the system (104 bytes on macOS, 108 on Linux)
        return path
    runtime = Path(env.str("XDG_RUNTIME_DIR", "") or tempfile.gettempdir())
    return runtime / f"kangaroo-{os.getuid()}-{hashlib.sha256(os.fsencode(VAR)).hexdigest()[:12]}" / f"{name}.sock"


# Security -------------------------------------------------------------------------------------------------------------
DEBUG = env.bool("DEBUG", False)
SECRET_KEY = env.str("SECRET_KEY", "") or _kept_secret("secret-key")
ALLOWED_HOSTS = env.list("ALLOWED_HOSTS", ["localhost", "127.0.0.1", "[::1]"])
CSRF_TRUSTED_ORIGINS: list[str] = env.list("CSRF_TRUSTED_ORIGINS", [])

#: Leaves what is named like a key or a password out of error pages, with DEBUG too.
DEFAULT_EXCEPTION_REPORTER_FILTER = "experiments.credentials.ReportFilter"

#: True where the site is reached over https (through a proxy that sets X-Forwarded-Proto).
HTTPS = env.bool("HTTPS", False)
SECURE_SSL_REDIRECT = SESSION_COOKIE_SECURE = CSRF_COOKIE_SECURE = HTTPS
SECURE_HSTS_SECONDS = 31_536_000 if HTTPS else 0
SECURE_HSTS_INCLUDE_SUBDOMAINS = SECURE_HSTS_PRELOAD = HTTPS
SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https") if HTTPS else None
SECURE_REFERRER_POLICY = "same-origin"
X_FRAME_OPTIONS = "DENY"
CONTENT_SECURITY_POLICY = {
    "DIRECTIVES": {
        "default-src": [NONE],
        "script-src": [SELF],
        "style-src": [SELF],
        "img-src": [SELF, "data:"],
        "connect-src": [SELF],
        "font-src": [SELF],
        "form-action": [SELF],
        "base-uri": [NONE],
        "frame-ancestors": [NONE],
        "manifest-src": [SELF],
    }
}

# Application ----------------------------------------------------------------------------------------------------------
INSTALLED_APPS = [
    "accounts",
    "experiments",
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "whitenoise.runserver_nostatic",
    "django.contrib.staticfiles",
    "django.contrib.humanize",
    "allauth",
    "allauth.account",
    "allauth.mfa",
    "allauth.usersessions",
    "csp",
    "django_htmx",
    "django_rq",
    "template_partials",
]
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "whitenoise.middleware.WhiteNoiseMiddleware",
    "csp.middleware.CSPMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
    "django_htmx.middleware.HtmxMiddleware",
    "allauth.account.middleware.AccountMiddleware",
    "accounts.middleware.LastActiveMiddleware",
]
ROOT_URLCONF = "kangaroo_site.urls"
WSGI_APPLICATION = "kangaroo_site.wsgi.application"
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "DIRS": [BASE_DIR / "templates"],
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ],
        },
    }
]
LANGUAGE_CODE = "en"
TIME_ZONE = env.str("TIME_ZONE", "UTC")
USE_TZ = True
USE_THOUSAND_SEPARATOR = False

# Database: SQLite in WAL mode unless DATABASE_URL names another -------------------------------------------------------
DATABASES = {"default": env.dj_db_url("DATABASE_URL", f"sqlite:///{VAR / 'kangaroo.sqlite3'}")}
if DATABASES["default"]["ENGINE"] == "django.db.backends.sqlite3":
    DATABASES["default"]["OPTIONS"] = {
        # IMMEDIATE: a transaction that will write takes its lock at BEGIN, where SQLite waits for it, instead of
        # failing in the middle. Hence no ATOMIC_REQUESTS, and no network traffic inside a transaction.
        "transaction_mode": "IMMEDIATE",
        "timeout": 20,
        "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; PRAGMA mmap_size=134217728;"
        "PRAGMA journal_size_limit=67108864; PRAGMA cache_size=-20000;",
    }
else:
    DATABASES["default"].setdefault("CONN_MAX_AGE", 60)
    DATABASES["default"]["CONN_HEALTH_CHECKS"] = True
CACHES = {
    # Shared by all processes, so that sign-in rate limits hold for all of them together.
    "default": {
        "BACKEND": "django.core.cache.backends.db.DatabaseCache",
        "LOCATION": "cache",
        "OPTIONS": {"MAX_ENTRIES": 50_000},  # the default of 300 would forget limits as soon as there are many people
    }
}

# Queue: an embedded broker on a socket in var/ unless REDIS_URL names another -----------------------------------------
REDIS_URL = env.str("REDIS_URL", "")
BROKER_DIR = VAR / "broker"
BROKER_SOCKET = _socket("broker")
RQ_QUEUES = {
    "default": {"URL": REDIS_URL or f"unix://{BROKER_SOCKET}", "DB": 0, "DEFAULT_TIMEOUT": -1},
}
RQ = {"COMMIT_MODE": "on_db_commit"}

# Accounts -------------------------------------------------------------------------------------------------------------
AUTH_USER_MODEL = "accounts.User"
AUTHENTICATION_BACKENDS = [
    "django.contrib.auth.backends.ModelBackend",
    "allauth.account.auth_backends.AuthenticationBackend",
]
AUTH_PASSWORD_VALIDATORS = [
    {"NAME": f"django.contrib.auth.password_validation.{name}"}
    for name in ("UserAttributeSimilarityValidator", "MinimumLengthValidator", "CommonPasswordValidator")
]
ACCOUNT_USER_MODEL_USERNAME_FIELD = None
ACCOUNT_LOGIN_METHODS = {"email"}
ACCOUNT_SIGNUP_FIELDS = ["email*", "password1*", "password2*"]
#: "none", "optional" or "mandatory"
ACCOUNT_EMAIL_VERIFICATION = env.str("EMAIL_VERIFICATION", "optional")
ACCOUNT_ADAPTER = "accounts.adapter.Adapter"
ACCOUNT_CHANGE_EMAIL = True  # one address a person; the old one holds until the new one is confirmed
ACCOUNT_REAUTHENTICATION_REQUIRED = True  # an open session alone may not take the account over
ACCOUNT_SESSION_REMEMBER = True
ACCOUNT_EMAIL_NOTIFICATIONS = True
ACCOUNT_EMAIL_SUBJECT_PREFIX = "Kangaroo: "
ACCOUNT_DEFAULT_HTTP_PROTOCOL = "https" if HTTPS else "http"
ACCOUNT_LOGOUT_REDIRECT_URL = "home"
ACCOUNT_RATE_LIMITS = {  # allauth's own limits stand beside these
    "guest": env.str("GUEST_RATE_LIMIT", "20/h/ip"),
    "look": "30/m/ip",  # how often the site looks up a checkpoint for somebody: each time it starts a process
    "host": env.str("HOST_RATE_LIMIT", "30/m/user"),  # how often the site tries to reach a user's machines for them
}
#: How many proxies stand in front; limits by address are counted for the address that the last of them saw.
ALLAUTH_TRUSTED_PROXY_COUNT = env.int("TRUSTED_PROXY_COUNT", 0)
ACCOUNT_AUTHENTICATED_LOGIN_REDIRECTS = False  # a guest is signed in, and must be able to sign up
#: Guests idle for longer are removed with their work.
GUEST_IDLE_DAYS = env.int("GUEST_IDLE_DAYS", 30)
# A session is all that leads a guest to their work, so it lasts as long; use begins it anew.
SESSION_COOKIE_AGE = max(14, GUEST_IDLE_DAYS + 1) * 24 * 3600
#: Keys for secrets at rest, newest first (accounts/ring.py). In a file of their own where none is named here.
CREDENTIAL_KEYS: list[str] = env.list("CREDENTIAL_KEYS", [])
CREDENTIAL_KEYS_FILE = VAR / "credential-keys"
MFA_ADAPTER = "accounts.second_factor.Adapter"
MFA_SUPPORTED_TYPES = ["totp", "webauthn", "recovery_codes"]
MFA_FORMS = {
    "authenticate": "accounts.forms.CodeForm",
    "reauthenticate": "accounts.forms.CodeAgainForm",
    "activate_totp": "accounts.forms.FirstCodeForm",
    "login_webauthn": "accounts.forms.PasskeyLoginForm",
    "add_webauthn": "accounts.forms.PasskeyForm",
    "edit_webauthn": "accounts.forms.PasskeyNameForm",
}
MFA_TOTP_ISSUER = "Kangaroo"
# A passkey signs in alone, so it must have checked who holds it (a PIN, a finger). Browsers offer passkeys on https and
# on localhost only; both are origins that are accepted without MFA_WEBAUTHN_ALLOW_INSECURE_ORIGIN.
MFA_PASSKEY_LOGIN_ENABLED = True
MFA_WEBAUTHN_USER_VERIFICATION = "required"
#: Where addresses need not be confirmed (no mail can be sent, perhaps), a second factor does not ask for it either.
MFA_ALLOW_UNVERIFIED_EMAIL = ACCOUNT_EMAIL_VERIFICATION != "mandatory"
USERSESSIONS_TRACK_ACTIVITY = True  # by accounts.middleware, which does not write with every request
LOGIN_REDIRECT_URL = "profile"
LOGIN_URL = "account_login"
EMAIL_CONFIG = env.dj_email_url("EMAIL_URL", "console:")
vars().update({key: value for key, value in EMAIL_CONFIG.items() if key.startswith("EMAIL_")})
DEFAULT_FROM_EMAIL = env.str("DEFAULT_FROM_EMAIL", "kangaroo@localhost")

# Static files ---------------------------------------------------------------------------------------------------------
STATIC_URL = "static/"
STATIC_ROOT = VAR / "static"
#: What npm brings is part of the checkout's set-up, wherever KANGAROO_VAR is.
VENDOR_DIR = BASE_DIR / "var" / "vendor"
VENDOR_DIR.mkdir(parents=True, exist_ok=True)
STATICFILES_DIRS = [BASE_DIR / "static", VENDOR_DIR, ("docs", BASE_DIR / "docs" / "img")]
STORAGES = {
    "default": {"BACKEND": "django.core.files.storage.FileSystemStorage"},
    "staticfiles": {
        "BACKEND": "django.contrib.staticfiles.storage.StaticFilesStorage"
        if DEBUG
        else "whitenoise.storage.CompressedManifestStaticFilesStorage"
    },
}

# Training -------------------------------------------------------------------------------------------------------------
#: Run directories: RUNS_DIR / experiment id / model name.
RUNS_DIR = VAR / "experiments"
#: Checkpoints grown by themselves: GROWTHS_DIR / growth id / model.
GROWTHS_DIR = VAR / "growths"
#: Tokenised corpora, shared by all runs.
DATA_CACHE = VAR / "data"
#: Those that no run has used for so many days are removed, and prepared again when they are wanted. 0: never.
DATA_CACHE_DAYS = env.int("DATA_CACHE_DAYS", 30)
#: Folders whose files any user may name as a dataset or checkpoint on this machine. None by default.
_allowed: list[str] = env.list("LOCAL_DATA_DIRS", [])
LOCAL_DATA_DIRS = [Path(folder).resolve() for folder in _allowed]
#: Whether all users may train on what the operator's Hugging Face token opens, private repositories among it.
SHARE_HF_TOKEN = env.bool("SHARE_HF_TOKEN", False)
#: Text files that users sent: UPLOADS_DIR / user id / hash of the content / file name. Each user sees their own alone.
UPLOADS_DIR = VAR / "uploads"
MAX_UPLOAD_MB = env.int("MAX_UPLOAD_MB", 100)
FILE_UPLOAD_HANDLERS = [
    "django.core.files.uploadhandler.MemoryFileUploadHandler",
    "experiments.uploads.BoundedUploadHandler",
]
CORES = cores()
#: How many runs train at once on this machine; each gets its share of the cores.
LOCAL_SLOTS = env.int("LOCAL_SLOTS", min(2, CORES))
#: Whoever sends training to a machine of theirs has proved within so many seconds who they are.
HOST_SIGN_IN_SECONDS = env.int("HOST_SIGN_IN_SECONDS", 12 * 3600)
#: Finished models up to this size are brought from GPU hosts by themselves; larger ones when they are asked for.
FETCH_MODELS_GB = env.float("FETCH_MODELS_GB", 5.0)
#: Limits a user, guests included, may not pass. 0: none.
MAX_ACTIVE_RUNS_PER_USER = env.int("MAX_ACTIVE_RUNS_PER_USER", 30)
MAX_DISK_GB_PER_USER = env.int("MAX_DISK_GB_PER_USER", 50)
MAX_HOSTS_PER_USER = env.int("MAX_HOSTS_PER_USER", 20)
#: The most text that one experiment may be trained on, from wherever it comes. 0: any.
MAX_TEXT_GB = env.float("MAX_TEXT_GB", 20.0)
#: With less room than this left, nothing new is taken on. 0: no matter.
MIN_FREE_DISK_GB = env.float("MIN_FREE_DISK_GB", 1.0)

# GPU hosts ------------------------------------------------------------------------------------------------------------
#: Where the collector listens for what other processes want of a host.
KEEPER_SOCKET = _socket("keeper")
#: Addresses that hosts may have: networks, and the words public, private, loopback, link-local. What is loopback,
#: link-local or a cloud's metadata service is refused unless a word or network names it.
HOSTS_ALLOW: list[str] = env.list("HOSTS_ALLOW", ["public", "private"])
#: Ports that they may have; empty: any.
HOSTS_PORTS: list[int] = env.list("HOSTS_PORTS", [], subcast=int)

# Log to standard error, which the supervisor passes through -----------------------------------------------------------
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"plain": {"format": "%(levelname)s %(name)s: %(message)s"}},
    "handlers": {"console": {"class": "logging.StreamHandler", "formatter": "plain"}},
    "root": {"handlers": ["console"], "level": env.str("LOG_LEVEL", "INFO")},
}
