"""Puts the published map into the package: in a clone it lies in model_cards/, beside its report."""

from __future__ import annotations

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

MAP = Path("model_cards") / "smollm2-135m-instruct-schwartz"
FILES = ("adapter_config.json", "adapter_model.safetensors", "README.md")


class WithMap(build_py):
    """As always, and `neva_hf/maps/` with what `neva space` shows. An editable installation reads the clone's."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for name in FILES:
                self.mkpath(str(self._folder))
                self.copy_file(str(MAP / name), str(self._folder / name))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        found = super().get_outputs(include_bytecode)
        return found if self.editable_mode else [*found, *(str(self._folder / name) for name in FILES)]

    @property
    def _folder(self) -> Path:
        return Path(self.build_lib) / "neva_hf" / "maps" / MAP.name


setup(cmdclass={"build_py": WithMap})
