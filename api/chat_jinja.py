"""The chat templates of api/chat.py once more in Jinja, for clients that render prompts themselves.

The server does not use them; tests/api/test_chat_jinja.py shows that they say the same.
"""

from __future__ import annotations

from api.chat import OPENINGS, SEPARATOR, Template

_LABELS = (
    "{%- set labels = {'user': 'User', 'assistant': 'Assistant', 'system': 'System',"
    " 'developer': 'System', 'tool': 'User'} -%}"
)
_CONTENT = (
    "{%- set content = message.content if message.content is string else"
    r" (message.content or []) | map(attribute='text') | join('\n') -%}"
)
# Lines of white space only are left out.
_COLLAPSED = (
    "{%- set kept = namespace(text='') -%}"
    r"{%- for line in content.replace('\r\n', '\n').replace('\r', '\n').strip().split('\n')"
    " if line.strip() -%}"
    r"{%- set kept.text = kept.text ~ ('\n' if kept.text else '') ~ line -%}"
    "{%- endfor -%}"
)
_LABEL = "{{- labels[message.role.strip().lower()] ~ ':' -}}"
_TEXTS: dict[Template, str] = {
    "g1": _COLLAPSED + _LABEL + "{{- ' ' ~ kept.text if kept.text else '' -}}",
    "rwkv-rs": _LABEL + "{{- ' ' ~ content -}}",
}


def _quoted(text: str) -> str:
    return "'" + text.replace("\n", r"\n") + "'"


def _template(name: Template) -> str:
    separator, opening = _quoted(SEPARATOR), _quoted(OPENINGS[name])
    return (
        f"{_LABELS}{{%- for message in messages -%}}{_CONTENT}{_TEXTS[name]}"
        f"{{{{- {separator} if not loop.last or add_generation_prompt else '' -}}}}"
        "{%- endfor -%}"
        f"{{{{- {opening} if add_generation_prompt else '' -}}}}"
    )


JINJA: dict[Template, str] = {name: _template(name) for name in _TEXTS}
