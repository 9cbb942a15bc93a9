"""Promises about the house as a whole."""

import subprocess
import sys

import pytest


def _modules_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sorted(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


HEAVY = {"torch", "transformers", "datasets", "tokenizers", "numpy"}


@pytest.mark.parametrize(
    "statement",
    [
        "import kangaroo_site.wsgi as w; from django.urls import get_resolver; get_resolver().url_patterns",
        "import trainer.spec, trainer.events",
        "import kangaroo_site.wsgi, experiments.worker, experiments.jobs, experiments.supervisor",
        "import trainer.agent",
        "import trainer.growth.lineage, trainer.families, trainer.budget",
    ],
)
def test_neither_the_site_nor_the_torch_free_modules_import_anything_heavy(statement: str) -> None:
    assert not _modules_after(statement) & HEAVY


def test_the_agent_needs_the_standard_library_alone() -> None:
    third_party = {name.partition(".")[0] for name in _modules_after("import trainer.agent")} - set(
        sys.stdlib_module_names
    )
    assert {name for name in third_party if not name.startswith("_")} <= {"trainer", "sitecustomize"}
