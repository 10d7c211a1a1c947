"""`import neva_hf` brings in nothing that only some people need."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("gradio", "matplotlib", "datasets", "evaluate", "sklearn", "typer", "rich", "gguf", "yaml", "pandas", "scipy")
PRINT_MODULES = "import {package}, sys; print(*sorted(sys.modules), sep='\\n')"


def modules_after_importing(package: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:neva_hf", "-c", PRINT_MODULES.format(package=package)],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())


def test_importing_neva_hf_imports_nothing_heavy_beyond_peft() -> None:
    before, after = modules_after_importing("peft"), modules_after_importing("neva_hf")
    added = {name.split(".")[0] for name in after - before}
    assert "neva_hf" in added
    assert not added & set(HEAVY)


def test_importing_neva_hf_makes_the_method_known_to_peft() -> None:
    import peft

    import neva_hf

    assert peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING["NEVA"] is neva_hf.NeVAConfig
    assert peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING["NEVA"] is neva_hf.NeVATuner
    assert peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING["NEVA"] == "neva_"


def test_every_public_name_is_there() -> None:
    import neva_hf

    assert all(hasattr(neva_hf, name) for name in neva_hf.__all__)
