"""Docstrings: everything public has one, and the public door's are complete.

ruff holds their form. It does not see that a method inherits its docstring, nor that a parameter,
a returned value or an error goes unmentioned: that is checked here.
"""

import ast
import dataclasses
import importlib
import inspect
import math
import pkgutil
import re
import textwrap

import pytest

import hf_precond

SECTIONS = "Args|Returns|Yields|Raises|Attributes|Source|Example"
MODULES = sorted(
    module.name for module in pkgutil.walk_packages(hf_precond.__path__, "hf_precond.")
    if not module.name.endswith("__main__")
)  # fmt: skip
# "The mean of …", "Whether …" say what is returned; "Compute …" does not.
NAMES_THE_VALUE = re.compile(r"(The|A|An|Whether|Every|Each|What|Which|How many|Returns|``)\b|``")


def is_public(name):
    return not name.startswith("_")


def is_ours(thing):
    return getattr(thing, "__module__", "").split(".")[0] == "hf_precond"


def function_of(member):
    """The function behind a method, class method or property; ``None`` behind anything else."""
    if isinstance(member, classmethod | staticmethod):
        member = member.__func__
    if isinstance(member, property):
        member = member.fget
    return member if inspect.isfunction(member) and is_ours(member) else None


def methods(cls):
    """The public methods and properties that a class of this package defines itself."""
    for name, member in vars(cls).items():
        if is_public(name) and function_of(member) is not None:
            yield name, function_of(member)


@pytest.mark.parametrize("name", MODULES)
def test_everything_public_has_a_docstring(name):
    module = importlib.import_module(name)
    missing = [] if module.__doc__ else [name]
    for key, thing in vars(module).items():
        if not is_public(key) or getattr(thing, "__module__", None) != name:
            continue
        if inspect.isfunction(thing) and not thing.__doc__:
            missing.append(key)
        if inspect.isclass(thing):
            # A dataclass without a docstring has its signature for one.
            if not thing.__doc__ or thing.__doc__.startswith(f"{key}("):
                missing.append(key)
            # getdoc finds the docstring of the method that is overridden.
            missing += [
                f"{key}.{method}" for method, _ in methods(thing)
                if not inspect.getdoc(inspect.getattr_static(thing, method))
                and not inspect.getdoc(getattr(thing, method))
            ]  # fmt: skip
    assert not missing


def leads_somewhere(module, target):
    """Whether the target of a cross reference exists: a full path, or a name of the module."""
    parts = target.split(".")
    if parts[0] in ("torch", "transformers", "accelerate"):
        return True
    if parts[0] == "hf_precond":
        owner = hf_precond
        for number, part in enumerate(parts[1:], 2):
            path = ".".join(parts[:number])
            owner = importlib.import_module(path) if path in MODULES else getattr(owner, part, None)
        return owner is not None
    classes = [thing for thing in vars(module).values() if inspect.isclass(thing)]
    for owner in (module, *classes):
        for part in parts:
            fields = getattr(owner, "__annotations__", {})
            owner = getattr(owner, part, fields.get(part))
        if owner is not None:
            return True
    return False


@pytest.mark.parametrize("name", MODULES)
def test_cross_references_lead_somewhere(name):
    module = importlib.import_module(name)
    roles = "func|meth|class|mod|data|attr|exc"
    source = inspect.getsource(module)
    targets = re.findall(rf":(?:{roles}):`~?([\w.]+)`", source)
    lost = [target for target in targets if not leads_somewhere(module, target)]
    assert not [target for target in lost if f"self.{target}" not in source]


# The public door ------------------------------------------------------------------------


def sections(doc):
    """Section name to its text; the part before the first section under the empty name."""
    parts = re.split(rf"^({SECTIONS}):", inspect.cleandoc(doc or ""), flags=re.MULTILINE)
    return {"": parts[0]} | dict(zip(parts[1::2], map(textwrap.dedent, parts[2::2]), strict=True))


def entries(text):
    """The names that a section's entries begin with: ``betas: …``, ``TypeError, KeyError: …``."""
    heads = re.findall(r"^([*\w][\w.*, ]*?)(?: \([^)]*\))?:(?:\s|$)", text, flags=re.MULTILINE)
    return {name.strip("* ") for head in heads for name in head.split(",")}


def inherited(cls, section):
    """The entries of one section in the docstrings of a class and its bases."""
    docs = [sections(base.__doc__) for base in cls.__mro__ if is_ours(base)]
    return set().union(*(entries(doc.get(section, "")) for doc in docs))


def raised(function):
    """The names of the exceptions that a function's own body raises."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and node.exc is not None:
            error = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            if isinstance(error, ast.Name) and error.id[0].isupper():
                found.add(error.id)
    return found


def parameters(function):
    """What a caller may pass: ``*args`` that are handed on to another class's method is not it."""
    given = inspect.signature(function).parameters.values()
    return {
        p.name for p in given
        if p.name not in ("self", "cls") and is_public(p.name) and p.name not in ("args", "kwargs")
    }  # fmt: skip


def door():
    """``(class or None, name, function)`` of everything that ``import hf_precond`` offers.

    A method of a base class is listed once, under that class.
    """
    classes = {}
    for name in hf_precond.__all__:
        thing = getattr(hf_precond, name)
        if inspect.isclass(thing):
            classes |= dict.fromkeys(base for base in thing.__mro__ if is_ours(base))
        else:
            yield None, name, getattr(thing, "__func__", thing)
    for cls in classes:
        for name, function in methods(cls):
            yield cls, name, function


DOOR = list(door())
IDS = [name if cls is None else f"{cls.__name__}.{name}" for cls, name, _ in DOOR]
CLASSES = [name for name in hf_precond.__all__ if inspect.isclass(getattr(hf_precond, name))]


@pytest.mark.parametrize("name", [name for name in CLASSES if name.endswith("Config")])
def test_fields_are_described_with_their_range_and_default(name):
    cls = getattr(hf_precond, name)
    text = sections(cls.__doc__)["Args"]
    described = dict(re.findall(r"^(\w+): (.*?)(?=^\w|\Z)", text, re.DOTALL | re.MULTILINE))
    for field in dataclasses.fields(cls):
        if field.name in described:  # else the base class describes it
            words = " ".join(described[field.name].split())
            assert default_in_words(field) in words, field.name
            assert range_in_words(field) in words, field.name


def default_in_words(field):
    value = field.default
    if isinstance(value, tuple):
        return f"Default {' and '.join(f'{number:g}' for number in value)}."
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"Default ``{value}``"
    return f"Default {value:g}".replace("e-0", "e-")


def range_in_words(field):
    low, high, open_low, open_high = field.metadata.get("bounds", (None,) * 4)
    if low is None:
        return ""
    if high == math.inf:
        return f"{'>' if open_low else '>='} {low:g}"
    return f"in {'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"


@pytest.mark.parametrize("name", CLASSES)
def test_classes_describe_what_they_are_made_with(name):
    cls = getattr(hf_precond, name)
    if dataclasses.is_dataclass(cls):
        wanted = {field.name for field in dataclasses.fields(cls)}
    else:
        wanted = parameters(cls.__init__) if is_ours(cls.__init__) else set()
        wanted -= {"fields"}  # refused, by the right call
    assert inherited(cls, "Args") - {"fields"} == wanted
    maker = vars(cls).get("__post_init__" if dataclasses.is_dataclass(cls) else "__init__")
    if maker is not None:
        assert raised(maker) <= inherited(cls, "Raises")


@pytest.mark.parametrize(("cls", "name", "function"), DOOR, ids=IDS)
def test_functions_describe_parameters_value_and_errors(cls, name, function):
    if cls is None:
        versions = [function]
    else:  # a method, and those that it overrides
        versions = [function_of(vars(base).get(name)) for base in cls.__mro__ if is_ours(base)]
    docs = [sections(version.__doc__) for version in versions if version is not None]
    arguments, errors = (
        set().union(*(entries(doc.get(key, "")) for doc in docs)) for key in ("Args", "Raises")
    )
    assert parameters(function) == arguments - {"args", "kwargs"}
    assert raised(function) <= errors
    if function.__annotations__.get("return") not in (None, "None"):
        assert any(
            "Returns" in doc or "Yields" in doc or NAMES_THE_VALUE.match(doc[""]) for doc in docs
        )
