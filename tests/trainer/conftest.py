"""Text, prepared once for all tests of a process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trainer.texts import write_modules


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of real documents."""
    return write_modules(tmp_path_factory.mktemp("text") / "modules")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of prepared text."""
    return tmp_path_factory.mktemp("cache")
