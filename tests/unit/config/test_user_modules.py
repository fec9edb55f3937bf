"""Which modules are the user's own."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from mtl_dist.config.user_modules import imported_hashes


def test_a_script_is_no_module_whatever_multiprocessing_calls_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("script", "of_mine"):
        (tmp_path / f"{name}.py").write_text("")
    script, module = ModuleType("__main__"), ModuleType("of_mine")
    script.__file__, module.__file__ = str(tmp_path / "script.py"), str(tmp_path / "of_mine.py")
    for name, one in (("__main__", script), ("__mp_main__", script), ("of_mine", module)):
        monkeypatch.setitem(sys.modules, name, one)
    assert "of_mine" in imported_hashes()
    assert not imported_hashes().keys() & {"__main__", "__mp_main__"}
