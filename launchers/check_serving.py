"""Asks a running server the test questions of a run and compares its answers with those of `pst evaluate`.

    python launchers/check_serving.py http://localhost:8000 runs/mine/export

URL is any OpenAI-compatible server of the export or of its GGUF file: llama-server, `transformers serve`, vLLM, SGLang,
TGI. Each question is asked through completions and chat, alone and several at once, greedily. Needs only Python 3.10.
Exit code 0: every answer equals the recorded one and stopped by itself. 1: some did not. 2: nothing could be compared.
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

THINKS_FIRST = ("pre_thinking",)
OWN_RULE = ("adaptive",)
"""Arms whose recorded answers follow a rule of pst_dist's own, which no server has."""
PREFIX = {"prefix": "predict: "}
"""The text before the question by which an arm asks for an answer; a chat template has it."""


def call(url: str, body: dict | None = None, timeout: float = 600.0) -> dict:
    """The JSON reply to a POST of `body`, or to a GET without one."""
    content = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, content, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout) as response:
        return json.load(response)


def model_of(url: str) -> str:
    """The name of the first model that the server lists; `default` when it lists none."""
    try:
        listed = call(f"{url}/v1/models").get("data") or []
    except (urllib.error.URLError, ValueError):
        listed = []
    return listed[0]["id"] if listed else "default"


def prompt_of(fmt: dict, row: dict) -> str:
    """The text before a row's answer: the question in the student's prompt, or the turns that it was asked as."""
    before, _, after = fmt["prompt"].partition("{question}")
    turns = row.get("turns") or [["user", row["question"]]]
    if turns[0][0] == "system":
        first, _, second = fmt["turns"]["system"].partition("{system}")
        before, turns = first + turns[0][1] + second, turns[1:]
    for role, text in turns[:-1]:
        before += text + fmt["turns"]["reply" if role == "user" else "next"]
    return before + PREFIX.get(fmt["arm"], "") + turns[-1][1] + after


def ask(url: str, model: str, fmt: dict, row: dict, *, chat: bool, most: int) -> tuple[str, bool]:
    """(the answer without outer spaces, whether it stopped by itself)."""
    body: dict = {"model": model, "temperature": 0.0, "max_tokens": most}
    if chat:
        turns = row.get("turns") or [["user", row["question"]]]
        messages = [{"role": role, "content": text} for role, text in turns]
        choice = call(f"{url}/v1/chat/completions", {**body, "messages": messages})["choices"][0]
        text = choice["message"]["content"] or ""
    else:
        prompt = prompt_of(fmt, row)
        if fmt["semantic_position"] == "before":
            prompt += fmt["semantic_token"] * fmt["semantic_tokens"]
        choice = call(f"{url}/v1/completions", {**body, "prompt": prompt})["choices"][0]
        text = choice["text"]
    if fmt["arm"] in THINKS_FIRST:
        text = text.partition(fmt["answer_marker"].strip())[2]
    return text.strip(), choice.get("finish_reason") == "stop"


def compare(url: str, model: str, fmt: dict, rows: list[dict], *, chat: bool, at_once: int, most: int) -> bool:
    """Ask every row in one way, print what was found, and tell whether all is equal."""
    name = f"{'chat' if chat else 'completions'}, {'one by one' if at_once == 1 else f'{at_once} at once'}"
    try:
        with ThreadPoolExecutor(at_once) as pool:
            answers = list(pool.map(lambda row: ask(url, model, fmt, row, chat=chat, most=most), rows))
    except (urllib.error.URLError, OSError, KeyError, ValueError, TypeError) as error:
        print(f"{name}: no answers ({type(error).__name__}: {error})")
        return False
    different = [
        (row, text) for row, (text, _) in zip(rows, answers, strict=True) if text != row["answer_text"].strip()
    ]
    endless = sum(not stopped for _, stopped in answers)
    print(f"{name}: {len(different)} of {len(rows)} answered differently, {endless} did not stop by themselves")
    for row, text in different[:3]:
        print(f"  {row['question'][:70]!r}: {text[:60]!r} instead of {row['answer_text'].strip()[:60]!r}")
    return not different and not endless


def main(words: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="the server, without /v1")
    parser.add_argument("export", type=Path, help="the exported folder, for its prompt (pst.json)")
    parser.add_argument("--answers", type=Path, help="samples.jsonl of `pst evaluate`; default: that of the run")
    parser.add_argument("--model", help="the model's name at the server; default: the first that it lists")
    parser.add_argument("--rows", type=int, default=100, help="how many questions (default %(default)s)")
    parser.add_argument("--at-once", type=int, default=8, help="how many at once in the second round (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=256, help="limit of an answer (default %(default)s)")
    parser.add_argument("--no-chat", action="store_true", help="the export has no chat template")
    given = parser.parse_args(words)
    answers = given.answers or given.export.resolve().parent / "eval" / "test" / "samples.jsonl"
    try:
        fmt = json.loads((given.export / "pst.json").read_text(encoding="utf-8"))
        rows = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()][: given.rows]
    except (OSError, ValueError) as error:
        print(f"cannot read the export or its recorded answers: {error}", file=sys.stderr)
        return 2
    if not rows or fmt["arm"] in OWN_RULE:
        print(f"nothing to compare: {len(rows)} rows, arm {fmt['arm']}", file=sys.stderr)
        return 2
    url = given.url.rstrip("/").removesuffix("/v1")
    model = given.model or model_of(url)
    print(f"{url}, model {model}, {len(rows)} questions")
    equal = True
    for chat in (False,) if given.no_chat else (False, True):
        for at_once in (1, given.at_once):
            equal &= compare(url, model, fmt, rows, chat=chat, at_once=at_once, most=given.max_tokens)
    print("every answer is the recorded one" if equal else "not the same answers")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
