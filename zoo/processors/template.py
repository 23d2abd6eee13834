"""Chat templates: how a checkpoint wants a conversation spelled out, in Jinja.

A template comes with a checkpoint and is a program, so it runs in Jinja's sandbox, which lets it
read what it is given and nothing else: plain values, without methods of ours.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from zoo.models.core.errors import UsageError, ZooError
from zoo.processors.files import read_json, read_text

Message = Mapping[str, Any]
"""One turn: `role`, and `content`, a text or a list of {"type": "text", "text": ...} and
{"type": "image"}."""


class _Generation(Extension):
    """Lets templates mark what the model has said, which matters in training alone."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


class _Dict:
    """The function `dict` of templates, without the attributes of the type."""

    def __call__(self, *args: Any, **values: Any) -> dict[str, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[str, Any]:
        return dict.fromkeys(*args)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As the standard library; Jinja's own filter would escape HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_refuse,
        strftime_now=lambda form: datetime.now().strftime(form),
        dict=_Dict(),
    )
    return environment


@dataclass(frozen=True)
class ChatTemplate:
    """A template and what it may refer to.

    Attributes:
      source: in Jinja.
      names: the special tokens by the names that templates use, such as `bos_token`.
    """

    source: str
    names: Mapping[str, str] = field(default_factory=dict)

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **more: Any
    ) -> str:
        """The text of a conversation, up to where the model's answer begins.

        Args:
          messages: the turns.
          add_generation_prompt: whether to open the turn of the model.
          more: further variables that this template reads, such as `tools`.

        Raises:
          UsageError: there is no turn, or one has no role.
          ZooError: the template is malformed, or refuses the conversation.
        """
        if not messages:
            raise UsageError("the conversation is empty: want at least one message")
        for message in messages:
            if not isinstance(message, Mapping) or "role" not in message:
                raise UsageError(
                    f"a message is {message!r}: want a mapping with `role` and `content`"
                )
        values = {"tools": None, "documents": None, **self.names, **more}
        try:
            return self._compiled.render(
                messages=[_present(_plain(message)) for message in messages],
                add_generation_prompt=add_generation_prompt,
                **{name: _plain(value) for name, value in values.items()},
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise ZooError(
                f"the chat template refuses this conversation: {error or type(error).__name__}"
            ) from error

    @functools.cached_property
    def _compiled(self) -> jinja2.Template:
        try:
            return _environment().from_string(self.source)
        except jinja2.TemplateError as error:
            raise ZooError(f"the chat template cannot be read: {error}") from error


def find_template(folder: Path) -> str | None:
    """The chat template of a checkpoint; None if it has none.

    The first of: `processor_config.json`, `chat_template.json`, `chat_template.jinja`,
    `tokenizer_config.json`, each under the key `chat_template`.

    Raises:
      ZooError: a file cannot be read, or there are several templates and none is the default.
    """
    for name in ("processor_config.json", "chat_template.json"):
        if template := read_json(folder / name).get("chat_template"):
            return _default(template, folder / name)
    if (folder / "chat_template.jinja").is_file():
        return read_text(folder / "chat_template.jinja")
    file = folder / "tokenizer_config.json"
    template = read_json(file).get("chat_template")
    return None if template is None else _default(template, file)


def _default(template: Any, file: Path) -> str:
    """The template itself, or the default one of several."""
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}
    if isinstance(template, dict):
        if "default" not in template:
            listed = ", ".join(sorted(template))
            raise ZooError(f"{file} has the chat templates {listed}: want one called default")
        template = template["default"]
    if not isinstance(template, str):
        raise ZooError(f"{file}: chat_template is a {type(template).__name__}: want a text")
    return template


def _plain(value: Any) -> Any:
    """`value` rebuilt from JSON's types; of anything else only the name of its type."""
    if value is None or isinstance(value, bool):
        return value
    for plain in (str, int, float):
        if isinstance(value, plain):
            return plain(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return f"<{type(value).__name__}>"


def _present(message: dict[str, Any]) -> dict[str, Any]:
    """`message` without what is None, which many templates would spell out."""
    return {key: value for key, value in message.items() if value is not None}
