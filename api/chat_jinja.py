"""The chat templates of api/chat.py once more in Jinja, for clients that render prompts themselves.

The server does not use them. They know neither tools nor thinking; apart from these they say the
same, as tests/api/test_chat_jinja.py shows.
"""

from __future__ import annotations

from api.chat import FORMS, Template

_NO_TOOLS = (
    "{%- if tools or messages | selectattr('tool_calls', 'defined') | map(attribute='tool_calls')"
    " | select | list or 'tool' in messages | map(attribute='role') | map('trim')"
    " | map('lower') -%}"
    "{{- raise_exception('this template has no form for tools: send the messages to"
    " /v1/chat/completions, or ask /v1/chat/completions/render for the prompt') -}}"
    "{%- endif -%}"
)
_ROLE = (
    "{%- set role = message.role | trim | lower -%}"
    "{%- set role = 'system' if role == 'developer' else role -%}"
)
_CONTENT = (
    "{%- set content = message.content if message.content is string else"
    r" (message.content or []) | map(attribute='text') | join('\n') -%}"
)
_WITHOUT_THOUGHT = (
    "{%- if role == 'assistant' and content.lstrip().startswith('<think>')"
    " and '</think>' in content -%}"
    "{%- set content = content.split('</think>', 1)[1] -%}{%- endif -%}"
)
# Lines of white space only are left out.
_COLLAPSED = (
    "{%- set kept = namespace(text='') -%}"
    r"{%- for line in content.replace('\r\n', '\n').replace('\r', '\n').strip().split('\n')"
    " if line.strip() -%}"
    r"{%- set kept.text = kept.text ~ ('\n' if kept.text else '') ~ line -%}"
    "{%- endfor -%}"
)
_LABEL = "{{- labels[role] -}}"
_TEXTS: dict[Template, str] = {
    "g1": _WITHOUT_THOUGHT + _COLLAPSED + _LABEL + "{{- ' ' ~ kept.text if kept.text else '' -}}",
    "rwkv-rs": _LABEL + "{{- ' ' ~ content -}}",
}
_OPENINGS: dict[Template, str] = {"g1": "Assistant:", "rwkv-rs": "Assistant: <think>\n"}


def _quoted(text: str) -> str:
    return "'" + text.replace("\n", r"\n") + "'"


def _template(name: Template) -> str:
    form = FORMS[name]
    separator, opening = _quoted(form.separator), _quoted(_OPENINGS[name])
    labels = ", ".join(f"'{role}': '{label}'" for role, label in form.labels.items())
    no_tools = _NO_TOOLS if name == "g1" else ""
    return (
        f"{no_tools}{{%- set labels = {{{labels}}} -%}}{{%- for message in messages -%}}"
        f"{_ROLE}{_CONTENT}{_TEXTS[name]}"
        f"{{{{- {separator} if not loop.last or add_generation_prompt else '' -}}}}"
        "{%- endfor -%}"
        f"{{{{- {opening} if add_generation_prompt else '' -}}}}"
    )


JINJA: dict[Template, str] = {name: _template(name) for name in _TEXTS}
