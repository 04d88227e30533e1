"""The parser of all verbs: jsonargparse with one-line errors and late defaults."""

import difflib
import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from jsonargparse import (
    ActionConfigFile,  # pyright: ignore[reportPrivateImportUsage]
    ArgumentParser,
    Namespace,
)

from magnet_train.common import private_api
from magnet_train.common.assets import shipped_configurations
from magnet_train.common.errors import UserError, user_error_from
from magnet_train.common.yaml_files import read_yaml

TYPES = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "tuple": "a list",
    "list": "a list",
    "Iterable": "a list",
    "dict": "a mapping",
    "Union": "",
    "NoneType": "null",
}
"""What a type is called in a message."""

Defaults = Callable[[Namespace], dict[str, Any]]
"""Maps the options given by file or flag to defaults of the others."""


class ConfigFile(ActionConfigFile):
    """`--config`: a YAML file, YAML text, or the name of a bundled configuration; repeatable."""

    def __call__(
        self, parser: Any, cfg: Any, values: Any, option_string: str | None = None
    ) -> None:
        super().__call__(parser, cfg, find_config(values), option_string)


def config_help(with_names: bool = False) -> str:
    """Help text of `--config`; `with_names` lists the bundled configurations."""
    names = f": {', '.join(shipped_configurations())}" if with_names else ""
    return (
        "YAML file with any of these options; repeatable, later files and flags win. Bundled "
        f"configurations are found by name{names}."
    )


def find_config(text: str) -> str:
    """The path or YAML text that `--config` names.

    Args:
        text: a path, the name of a bundled configuration (`demo.yaml`, `conf/demo.yaml`), or YAML;
            of the JSON next to a generated clip, its options.

    Raises:
        UserError: if the file is not a regular UTF-8 file, or too large.
    """
    path = Path(text).expanduser() if len(text) < 4096 and "\n" not in text else None
    if path is None or text.lstrip().startswith(("{", "[")):
        return text
    if not path.exists():
        shipped = shipped_configurations()
        name = text.removeprefix("conf/")
        if name in shipped:
            path = shipped[name]
        elif path.suffix in (".yaml", ".yml", ".json") or "://" in text:
            raise UserError(f"--config {text}: no such file{did_you_mean(name, list(shipped))}")
        else:
            return text
    content = read_yaml(path, f"--config {path}")
    if content is not None and not isinstance(content, dict):
        kind = type(content).__name__
        raise UserError(f"--config {path}: contains a {kind}; give one NAME: VALUE per line")
    return options_of_note(path, content) or str(path)


def options_of_note(path: Path, content: Any) -> str | None:
    """The options in the JSON next to a generated clip, as text; None for any other file."""
    options = content.get("options") if isinstance(content, dict) else None
    is_note = path.suffix == ".json" and isinstance(options, dict)
    return json.dumps(options) if is_note else None


BOOLEANS = ("true", "false", "yes", "no", "null")
"""Values of boolean options, in lower case."""


class OneLineErrors(ArgumentParser):
    """Parser that raises UserErrors, reads dashes as underscores, and refuses NaN and infinity."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, allow_abbrev=False, **kwargs)
        self.late_defaults: Defaults | None = None
        """Called before parsing with the given options; returns defaults of the others."""
        self.options_class: Any = None

    def add_options(self, kind: Any, **texts: str) -> None:
        """Add the fields of a dataclass as options; lists take several values, as in --lora A B.

        Args:
            kind: the dataclass, with a docstring under each field.
            texts: help of lists, instead of these docstrings.
        """
        self.options_class = kind
        lists = private_api.list_options(kind)
        for name, (item, default, text) in lists.items():
            flags = ("-p", "--prompt") if name == "prompt" else (f"--{name}",)
            text = texts.get(name, text)
            self.add_argument(*flags, type=item, nargs="+", default=default, help=text)
        self.add_class_arguments(kind, nested_key=None, as_group=False, skip=set(lists))

    def options(self, config: Namespace) -> Any:
        """The dataclass of `add_options`, from parsed values."""
        kind = self.options_class
        return kind(**{field.name: config[field.name] for field in fields(kind)})

    def error(self, message: str, ex: Exception | None = None) -> Any:
        raise self._user_error(message, ex) from ex

    def _user_error(self, message: str, ex: Exception | None) -> UserError:
        if ex is not None and (found := user_error_from(ex)) is not None:
            return found
        text = parser_message(message)
        unknown = re.search(
            r"unrecognized arguments: --([\w.]+)|does not accept option '([\w.]+)'", text
        )
        if unknown:
            word, dashes = unknown[1] or unknown[2], "--" if unknown[1] else ""
            text += did_you_mean(word, self.option_names(), dashes)
        return UserError(text)

    def option_names(self) -> list[str]:
        """Names of all options, including subcommands', without dashes."""
        actions = [action for _, action in private_api.all_actions(self)]
        return [option.lstrip("-") for action in actions for option in action.option_strings]

    def parse_args(self, args: Any = None, *rest: Any, **settings: Any) -> Any:
        """Parse the options; dashes in their names are read as underscores.

        Raises:
            UserError: if an option is invalid.
        """
        args = self._normalized(sys.argv[1:] if args is None else args)
        if self.late_defaults is not None:
            self.set_defaults(self.late_defaults(self.given(args)))
        config = super().parse_args(args, *rest, **settings)
        check_finite(config)
        self._check_values(config)
        return config

    def _check_value_key(self, action: Any, value: Any, *rest: Any, **settings: Any) -> Any:
        """As jsonargparse's, which would take a single value in a file for a list."""
        if action.nargs == "+" and not isinstance(value, list | None):
            raise TypeError(f'Parser key "{action.dest}": Expected a list. Got value: {value}')
        return super()._check_value_key(action, value, *rest, **settings)

    def _normalized(self, args: Sequence[str]) -> list[str]:
        """The options with underscores, and with =true after a boolean one without a value."""
        args = [with_underscores(arg) for arg in args]
        flags = set(private_api.boolean_options(self))
        pairs = itertools.pairwise([*args, "--"])
        return [
            f"{arg}=true" if arg in flags and following.lower() not in BOOLEANS else arg
            for arg, following in pairs
        ]

    def _check_values(self, config: Namespace) -> None:
        """Raise a UserError for a group that is a value, or an option that lacks one."""
        verb = f"{getattr(config, 'subcommand', '')}."
        for name in private_api.option_groups(self):
            if name in config and not isinstance(config[name], Namespace | None):
                shown = f"{name.removeprefix(verb)} {str(config[name])[:80]}"
                raise UserError(f"--{shown}: give options, as YAML or one by one")
        for name in private_api.options_that_need_a_value(self):
            if name in config and config[name] is None:
                shown = name.removeprefix(verb)
                raise UserError(f"--{shown} null: give a value, or omit the option")

    def given(self, args: list[str]) -> Namespace:
        """Options given by files and flags, without defaults and linked values."""
        values = [
            o
            for o in self._normalized(args)
            if o not in ("-h", "--help") and not o.startswith("--print_config")
        ]
        return private_api.parse_without_defaults(self, values)


def with_underscores(arg: str) -> str:
    """
    >>> with_underscores("--decoding.max-cfg-coef=1e-3")
    '--decoding.max_cfg_coef=1e-3'
    """
    return re.sub(r"^--[\w.-]+(?==|$)", lambda name: "--" + name[0][2:].replace("-", "_"), arg)


def check_finite(config: Any) -> None:
    """Check that all numbers of a configuration are finite.

    Raises:
        UserError: that names the first option that is not.
    """
    for name, value in _leaves("", config):
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{name} {value}: not a finite number; give one")


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(f"{name}.{key}" if name else str(key), inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(name, inner)
    else:
        yield name, value


def did_you_mean(word: str, known: list[str], prefix: str = "") -> str:
    """The known word nearest to a misspelt one, as a question; empty if none is near.

    >>> did_you_mean("genrate", ["generate", "fit"])
    '; did you mean generate?'
    """
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def parser_message(text: str) -> str:
    """A parser's message in one line, at most 600 characters.

    >>> parser_message("Parser key \\"seed\\":\\n  - Expected a <class 'int'>. Got value: three")
    '--seed three: give an integer'
    """
    lines = [line.strip(" -") for line in text.splitlines() if line.strip(" -")]
    message = " ".join(dict.fromkeys(lines))
    if (reason := class_problem(text)) and (option := re.match(r'Parser key "(\S+)"', text)):
        return f"--{option[1]}: {reason}"
    for pattern in _WRONG_VALUE:
        if wrong := pattern.search(message):
            name, value = wrong["name"], wrong["value"][:100]
            return f"--{name} {value}: {_expected(wrong['expected'])}"
    return message[:600]


def class_problem(text: str) -> str:
    """Why a class, given by its path, is refused, from a parser's message; empty if none is.

    >>> class_problem("- Problem with given class_path 'a.B':\\n        No module named 'a'")
    "Problem with given class_path 'a.B': No module named 'a'"
    """
    found = _CLASS_PROBLEM.search(text)
    return "" if found is None else " ".join(found[1].split())


_CLASS_PROBLEM = re.compile(
    r"^ *- (Problem with given class_path .*(?:\n {6}.*)*|the following arguments are required.*"
    r"|Option '.*' is not accepted.*)",
    re.MULTILINE,
)
_WRONG_VALUE = (
    re.compile(
        r'Parser key "(?P<name>\S+)":.* Subtypes: \[(?P<expected>.*)\] Errors: .*'
        r"Given value: (?P<value>.*)"
    ),
    re.compile(
        r'Parser key "(?P<name>\S+)": Expected an? (?P<expected>.*?)\. Got value: (?P<value>.*)'
    ),
    re.compile(
        r'Parser key "(?P<name>\S+)": (?P<expected>Unable) to load config \W(?P<value>.*?)\W( |$)'
    ),
)


def _expected(kinds: str) -> str:
    """What to give instead, from a parser's names of types.

    >>> _expected("<class 'int'>, list[float], <class 'NoneType'>")
    'give an integer, a list or null'
    >>> _expected("typing.Literal['a', 'b']")
    'choose a, b'
    """
    if kinds == "Unable":
        return "give options, as YAML or one by one"
    choices = re.findall(r"typing\.Literal\[(.*?)\]", kinds)
    if choices:
        return f"choose {', '.join(choices).replace(chr(39), '')}"
    if size := re.fullmatch(r"tuple with (\d+) elements", kinds):
        return f"give {size[1]} values"
    kinds = re.sub(r"\[[^\[\]]*\]", "", kinds)  # the types of a list's entries
    names = [name.rpartition(".")[2] for name in re.findall(r"[\w.]+", kinds.replace("<class", ""))]
    words = [TYPES.get(name, f"a {name}") for name in dict.fromkeys(names)]
    words = [word for word in words if word and not (word == "an integer" and "float" in names)]
    *first, last = words or ["another value"]
    return f"give {', '.join(first)} or {last}" if first else f"give {last}"


def make_parser(verb: str, description: str) -> OneLineErrors:
    """Parser of a verb that is not run by LightningCLI, with `--config`."""
    parser = OneLineErrors(prog=f"python -m magnet_train {verb}", description=description)
    parser.add_argument("--config", action=ConfigFile, help=config_help())
    return parser
