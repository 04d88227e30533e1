"""torchaudio is importable even if its extension fails."""

import importlib
import sys
from pathlib import Path

import pytest

from magnet_train.common.errors import UserError
from magnet_train.common.torchaudio_import import ensure_torchaudio_imports, import_torchaudio


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts a fake torchaudio first on the path, from the code of its modules."""
    held = {n: m for n, m in sys.modules.items() if n.partition(".")[0] == "torchaudio"}
    for name in held:
        del sys.modules[name]
    monkeypatch.syspath_prepend(tmp_path)

    def write(package: str, extension: str) -> None:
        (tmp_path / "torchaudio" / "_extension").mkdir(parents=True)
        (tmp_path / "torchaudio" / "__init__.py").write_text(package)
        (tmp_path / "torchaudio" / "_extension" / "__init__.py").write_text(extension)
        importlib.invalidate_caches()

    yield write
    for name in [n for n in sys.modules if n.partition(".")[0] == "torchaudio"]:
        del sys.modules[name]
    sys.modules.update(held)


PACKAGE = """
from torchaudio._extension import _IS_TORCHAUDIO_EXT_AVAILABLE as compiled, fail_if_no_align
@fail_if_no_align
def forced_align(): ...
"""


@pytest.mark.parametrize(
    "failure", ["OSError('libcudart')", "RuntimeError('CUDA mismatch')", "ImportError('lib')"]
)
def test_a_broken_extension_is_left_out(install, failure: str):
    install(PACKAGE, f"raise {failure}")
    ensure_torchaudio_imports()
    torchaudio = import_torchaudio()
    assert torchaudio.compiled is False and sys.modules["torchaudio"] is torchaudio
    with pytest.raises(RuntimeError, match="forced_align needs torchaudio's extension"):
        torchaudio.forced_align()


def test_a_healthy_extension_is_kept(install):
    install(PACKAGE, "_IS_TORCHAUDIO_EXT_AVAILABLE = True\nfail_if_no_align = lambda f: f")
    assert import_torchaudio().compiled is True


def test_a_package_beyond_mending_is_named(install):
    install("raise OSError('no hope')", "")
    with pytest.raises(UserError, match=r"no hope.*pip uninstall torchaudio"):
        import_torchaudio()
    assert "torchaudio" not in sys.modules


def test_an_absent_package_is_said_to_be_absent(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torchaudio", None)
    ensure_torchaudio_imports()
    with pytest.raises(ModuleNotFoundError):
        import_torchaudio()
