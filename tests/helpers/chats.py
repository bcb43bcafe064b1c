"""Chat templates with the peculiarities of the public families, for the tokenizers of `zoo`.

TEMPLATES has them by the family whose tokenizer they are for; what sets one apart stands above it. They are written for
these tests, not copied.
"""

from __future__ import annotations

_LOOP = "{%- for m in messages -%}"
_END = "{%- endfor -%}"

TEMPLATES: dict[str, str] = {
    # A date in a system block that is always there, a header for every turn, trimmed content, a BOS in the template.
    "llama3": (
        "{{- bos_token -}}"
        "{%- if messages[0].role == 'system' -%}{%- set told = messages[0].content | trim -%}"
        "{%- set messages = messages[1:] -%}{%- else -%}{%- set told = '' -%}{%- endif -%}"
        "{%- if strftime_now is defined -%}{%- set day = strftime_now('%d %b %Y') -%}"
        "{%- else -%}{%- set day = '26 Jul 2024' -%}{%- endif -%}"
        "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + day + '\n\n' + told + '<|eot_id|>' -}}"
        + _LOOP
        + "{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' -}}"
        + _END
        + "{%- if add_generation_prompt -%}"
        "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- endif -%}"
    ),
    # The system text stands inside the first question; a space before and behind every reply, a BOS for every pair.
    "llama2": (
        "{%- if messages[0].role == 'system' -%}{%- set told = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' -%}"
        "{%- set messages = messages[1:] -%}{%- else -%}{%- set told = '' -%}{%- endif -%}"
        + _LOOP
        + "{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}"
        "{{- raise_exception('roles must alternate') -}}{%- endif -%}"
        "{%- if m.role == 'user' -%}"
        "{{- bos_token + '[INST] ' + (told if loop.first else '') + m.content | trim + ' [/INST]' -}}"
        "{%- else -%}{{- ' ' + m.content | trim + ' ' + eos_token -}}{%- endif -%}" + _END
    ),
    # The system text stands before the last question, however long the conversation is.
    "mistral": (
        "{{- bos_token -}}{%- if messages[0].role == 'system' -%}{%- set told = messages[0].content + '\n\n' -%}"
        "{%- set messages = messages[1:] -%}{%- else -%}{%- set told = '' -%}{%- endif -%}"
        + _LOOP
        + "{%- if m.role == 'user' -%}{{- '[INST] ' + (told if loop.last else '') + m.content + '[/INST]' -}}"
        "{%- else -%}{{- ' ' + m.content + eos_token -}}{%- endif -%}" + _END
    ),
    # A default system text; thoughts are dropped from earlier replies, and the newest reply gets an empty one.
    "qwen": (
        "{%- if messages[0].role != 'system' -%}"
        "{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' -}}{%- endif -%}"
        + _LOOP
        + "{%- set text = m.content.split('</think>')[-1].lstrip('\n') if m.role == 'assistant' else m.content -%}"
        "{%- if m.role == 'assistant' and loop.last -%}{%- set text = '<think>\n\n</think>\n\n' + text -%}{%- endif -%}"
        "{{- '<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n' -}}"
        + _END
        + "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
    ),
    # No system role, replies by the `model`, trimmed content.
    "gemma": (
        "{{- bos_token -}}{%- if messages[0].role == 'system' -%}"
        "{{- raise_exception('System role not supported') -}}{%- endif -%}"
        + _LOOP
        + "{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}"
        "{{- raise_exception('roles must alternate') -}}{%- endif -%}"
        "{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '\n' -}}"
        + _END
        + "{%- if add_generation_prompt -%}{{- '<start_of_turn>model\n' -}}{%- endif -%}"
    ),
    # A thought is begun for the reply.
    "gpt2": (
        _LOOP + "{%- if m.role == 'assistant' -%}{{- 'Assistant: ' + m.content + eos_token -}}"
        "{%- else -%}{{- m.role | capitalize + ': ' + m.content + '\n' -}}{%- endif -%}"
        + _END
        + "{%- if add_generation_prompt -%}{{- 'Assistant: <think>\n' -}}{%- endif -%}"
    ),
    # The prompt ends with a control token.
    "opt": _LOOP + "{{- '</s>' + m.role + '<pad>' + m.content -}}" + _END + "{{- '</s>assistant<pad>' -}}",
    # The prompt ends without white space.
    "neox": _LOOP + "{{- '# ' + m.role + ': ' + m.content + '\n' -}}" + _END + "{{- '# assistant:' -}}",
}
TAKES_SYSTEM = ("llama3", "llama2", "qwen", "gpt2", "opt", "neox")
"""Families whose template has one place for a system text, however long the conversation."""
