"""The chat templates that come with the library; ``{% generation %}`` marks what the assistant says, and so what is trained.

Each takes messages whose content is a text (with ``<image>`` where a picture stands) or a list of parts
``{"type": "image"}`` and ``{"type": "text", "text": ...}``.
"""

from __future__ import annotations

_RENDER_CONTENT = (
    "{%- macro render(content) -%}"
    "{%- if content is string -%}{{- content -}}"
    "{%- else -%}{%- for part in content -%}"
    "{%- if part['type'] == 'image' -%}{{- '<image>\\n' -}}{%- else -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- endmacro -%}"
)

#: LLaVA-1.5's conversation format "v1" (haotian-liu/LLaVA, llava/conversation.py, conv_vicuna_v1).
VICUNA_V1 = (
    _RENDER_CONTENT
    + "{{- bos_token | default('') -}}"
    + "{%- if messages[0]['role'] == 'system' -%}"
    + "{%- set system = render(messages[0]['content']) -%}{%- set turns = messages[1:] -%}"
    + "{%- else -%}"
    + '{%- set system = "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, '
    + "detailed, and polite answers to the user's questions.\" -%}{%- set turns = messages -%}"
    + "{%- endif -%}"
    + "{{- system + ' ' -}}"
    + "{%- for message in turns -%}"
    + "{%- if message['role'] == 'user' -%}{{- 'USER: ' + render(message['content']) + ' ' -}}"
    + "{%- else -%}{{- 'ASSISTANT: ' -}}"
    + "{%- generation -%}{{- render(message['content']) + eos_token -}}{%- endgeneration -%}"
    + "{%- endif -%}"
    + "{%- endfor -%}"
    + "{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}"
)

#: LLaVA's stage 1: the images, then the caption and a line break; the words of the user are dropped.
PLAIN = (
    _RENDER_CONTENT
    + "{{- bos_token | default('') -}}"
    + "{%- for message in messages -%}"
    + "{%- if message['role'] == 'user' -%}{{- '<image>' * (render(message['content']).split('<image>') | length - 1) -}}"
    + "{%- elif message['role'] == 'assistant' -%}"
    + "{%- generation -%}{{- render(message['content']) + '\\n' -}}{%- endgeneration -%}"
    + "{%- endif -%}"
    + "{%- endfor -%}"
)

#: ChatML, the format of SmolLM2 and Qwen2, without a system message of its own.
CHATML = (
    _RENDER_CONTENT
    + "{%- for message in messages -%}"
    + "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    + "{%- if message['role'] == 'assistant' -%}"
    + "{%- generation -%}{{- render(message['content']) + '<|im_end|>' -}}{%- endgeneration -%}"
    + "{%- else -%}{{- render(message['content']) + '<|im_end|>' -}}{%- endif -%}"
    + "{{- '\\n' -}}"
    + "{%- endfor -%}"
    + "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)

CHAT_TEMPLATES = {"vicuna_v1": VICUNA_V1, "plain": PLAIN, "chatml": CHATML}
