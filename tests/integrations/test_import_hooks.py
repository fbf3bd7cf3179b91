"""Acting on a module once it is imported (wrapt's post-import hooks)."""

import importlib
import importlib.util
import inspect
import sys
import threading
import types
from importlib.machinery import SourceFileLoader

import pytest

from hf_precond.integrations.registration import when_imported


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of an importable module that was not imported yet."""
    name = f"deferred_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text("value = 1\ndef f():\n    return value\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    sys.modules.pop(name, None)


def test_acts_once_after_the_module_was_executed(module):
    seen = []

    def act(imported):
        seen.append(imported.value)
        imported.value = 2

    when_imported(module, act)
    assert seen == [] and module not in sys.modules
    imported = importlib.import_module(module)
    assert seen == [1] and imported.f() == 2
    importlib.reload(imported)
    assert seen == [1]


def test_acts_at_once_on_an_imported_module(module):
    imported = importlib.import_module(module)
    seen = []
    when_imported(module, seen.append)
    assert seen == [imported]


def test_leaves_no_trace(module):
    when_imported(module, lambda imported: None)
    before = list(sys.meta_path)
    imported = importlib.import_module(module)
    assert sys.meta_path == before
    assert type(imported.__loader__) is type(imported.__spec__.loader) is SourceFileLoader
    assert "return value" in inspect.getsource(imported.f)


def test_looking_for_a_module_is_not_importing_it(module):
    seen = []
    when_imported(module, seen.append)
    assert importlib.util.find_spec(module).name == module
    assert seen == []
    importlib.import_module(module)
    assert len(seen) == 1


def test_works_behind_another_finder_that_asks_all_finders(module, monkeypatch):
    class Nosy:
        def find_spec(self, name, path=None, target=None):
            for finder in sys.meta_path:
                if finder is not self and (spec := finder.find_spec(name, path, target)):
                    return spec
            return None

    seen = []
    when_imported(module, seen.append)
    monkeypatch.setattr(sys, "meta_path", [Nosy(), *sys.meta_path])
    importlib.import_module(module)
    assert len(seen) == 1


def test_a_failed_import_can_be_tried_again(module, tmp_path):
    seen = []
    path = tmp_path / f"{module}.py"
    good = path.read_text()
    path.write_text("1 / 0")
    when_imported(module, seen.append)
    with pytest.raises(ZeroDivisionError):
        importlib.import_module(module)
    assert seen == []
    path.write_text(good + "# another length\n")
    importlib.invalidate_caches()
    importlib.import_module(module)
    assert len(seen) == 1


def test_waits_for_a_thread_that_is_importing_the_module(module, tmp_path):
    gate = types.SimpleNamespace(entered=threading.Event(), open=threading.Event())
    sys.modules[f"{module}_gate"] = gate
    code = f"import {module}_gate as gate\ngate.entered.set()\ngate.open.wait()\nvalue = 1\n"
    (tmp_path / f"{module}.py").write_text(code)
    importer = threading.Thread(target=importlib.import_module, args=(module,))
    importer.start()
    gate.entered.wait()
    threading.Timer(0.1, gate.open.set).start()
    seen = []
    when_imported(module, lambda imported: seen.append(imported.value))
    importer.join()
    del sys.modules[f"{module}_gate"]
    assert seen == [1]
