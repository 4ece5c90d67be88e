"""Chat templates of the kinds that are in use, for the tests of this folder."""

from __future__ import annotations

from edgetune.data.chat import BUILT_IN, read_override

LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim "
    "+ '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for message in messages %}\n"
    "    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
    "\n{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\n' }}\n{%- endif %}\n"
)
# As Qwen3's: earlier answers lose their thinking, so a prefix of the conversation is no prefix of its rendering.
THINKING = (
    "{%- for message in messages %}{%- if message.role == 'assistant' %}{%- set shown = message.content %}"
    "{%- if not loop.last and '</think>' in shown %}{%- set shown = shown.split('</think>')[-1].lstrip('\n') %}"
    "{%- elif loop.last and '</think>' not in shown %}{%- set shown = '<think>\n\n</think>\n\n' + shown %}{%- endif %}"
    "{{- '<|im_start|>assistant\n' + shown + '<|im_end|>\n' }}{%- else %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
FEATURES = (
    "{%- set ns = namespace(count=0) %}{%- for message in messages %}{%- if message.content == 'skip' %}{%- continue %}"
    "{%- endif %}{%- set ns.count = ns.count + 1 %}{{ message | tojson }}{{ {'ü': [1, 2]} | tojson(indent=2) }}"
    "{% generation %}{{ message.content }}{% endgeneration %}\n   {% if true %}\n indented {% endif %}\n"
    "{%- endfor %}{{ ns.count }} {{ strftime_now('%Y') }} {{ pad_token }}{{ not_there }}"
    "{% if tools %}{{ tools | tojson }}{% endif %}"
)

RENDERED = {
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "chatml": CHATML,
    "thinking": THINKING,
    "features": FEATURES,
    **{f"built-in {name}": read_override(name) for name in BUILT_IN},
}
