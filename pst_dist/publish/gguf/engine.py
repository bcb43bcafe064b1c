"""Asks a GGUF file in llama.cpp's own server (`server`) over loopback: the tokens of a text, and answers.

A file that llama.cpp cannot load, or a text that it reads as other tokens than transformers, is found here before
anything is published.
"""

from __future__ import annotations

import contextlib
import json
import unicodedata
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pst_dist.errors import ConfigError, EnvironmentFault, first_line
from pst_dist.publish.gguf.server import serving

PROBES = (
    "How many are 2 and 3?",
    "  two spaces, 1234.5 and 50% of 1,000,000\n\n\ttab  \r\n end ",
    "I've, we'll, it's, I'D, DON'T; naïve café, 北京 12 ½ Ⅻ ٣٤ ไทย 🚀🚀 e\u0301",
    "x=-3*(y+2)^2/7 \u00a0\u2003 __init__ [a]{b}<c> \"q\" 'z' `t` ~~ \\n",
)
_ANSWER_SECONDS = 600


@dataclass(frozen=True)
class Reply:
    """What the server gave for one prompt."""

    text: str
    tokens: list[int]
    """Ids of the generated tokens, the one that ended the generation included."""
    stopped: bool
    """Whether an end-of-generation token came; if not, the limit on tokens was reached."""


@dataclass(frozen=True)
class Engine:
    """A running server."""

    url: str

    def tokens(self, text: str) -> list[int]:
        """The ids that llama.cpp reads a prompt as, with the token that it puts before it."""
        return self._post("tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]

    def answer(self, prompt: str, most: int) -> Reply:
        """Complete a prompt greedily with at most `most` tokens; an empty reply to one that is too long for a slot."""
        wanted = {"prompt": prompt, "n_predict": most, "temperature": 0.0, "return_tokens": True, "cache_prompt": False}
        try:
            reply = self._post("completion", wanted)
        except urllib.error.HTTPError as error:
            if error.code == 400:
                return Reply("", [], False)
            raise
        return Reply(reply["content"], reply["tokens"], reply["stop_type"] == "eos")

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        # A proxy of the environment would be asked for loopback too.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        request = urllib.request.Request(
            f"{self.url}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with opener.open(request, timeout=_ANSWER_SECONDS) as response:
            return json.load(response)


@contextlib.contextmanager
def running(file: Path, *, slots: int, context: int) -> Iterator[Engine]:
    """A server of `file` with `slots` slots of `context` tokens; it ends with the block, and with this process.

    Raises EnvironmentFault with llama.cpp's own reason when it does not start, and when it stops to answer.
    """
    with serving(file, slots=slots, context=context) as url:
        try:
            yield Engine(url)
        except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
            raise EnvironmentFault(
                f"llama.cpp's server did not answer: {first_line(error, 200)}",
                "run the same command again",
                path=file.name,
            ) from error


def check_tokens(engine: Engine, tokenizer: Any, texts: Sequence[str], *, normalises: bool) -> None:
    """Raise ConfigError when llama.cpp reads one of the prompts as other tokens than the tokenizer does.

    `normalises`: the tokenizer brings text into form NFC and llama.cpp does not, so the texts are compared in NFC.
    """
    for text in texts:
        given = unicodedata.normalize("NFC", text) if normalises else text
        wanted, found = list(tokenizer(given)["input_ids"]), engine.tokens(given)
        if wanted == found:
            continue
        place = next((k for k, pair in enumerate(zip(wanted, found, strict=False)) if pair[0] != pair[1]), -1)
        raise ConfigError(
            f"llama.cpp reads {given[:60]!r} as other tokens than this student's tokenizer, from token {place} on: "
            f"{tokenizer.convert_ids_to_tokens(found[place : place + 3])} instead of "
            f"{tokenizer.convert_ids_to_tokens(wanted[place : place + 3])}",
            "serve the export with transformers (`transformers serve`)",
        )
