"""`pst export`: the student as a plain Hugging Face folder, as a GGUF file, and on the hub.

Each option imports what it needs when it runs, so that `pst --help` stays fast.
"""

from __future__ import annotations

import argparse

from pst_dist.cli.verb import CONFIG, OVERRIDES, REBUILD, Option, verb
from pst_dist.cli.words import finished_config_of
from pst_dist.errors import ConfigError

_TYPES = ("f32", "f16", "q8_0", "q4_k_m")


def _more() -> str:
    return (
        "--gguf also writes RUN/gguf/TYPE: a file for llama.cpp, a Modelfile for Ollama and a card. f32 keeps the\n"
        "weights as they are; the file of f16 has half that size, q8_0 (the default) a quarter, q4_k_m about a\n"
        "sixth. llama.cpp then answers test rows with the file; the output says how many answers differ from those\n"
        "of transformers.\n\n"
        "serve the export:    transformers serve RUN/export\n"
        "serve the GGUF file: llama-server -m RUN/gguf/q8_0/NAME.gguf\n"
        "                     ollama create NAME -f RUN/gguf/q8_0/Modelfile\n"
        "publish it:          pst export RUN --license apache-2.0 --push-to-hub NAME/REPO   (sends nothing yet)\n"
        "                     HF_TOKEN=… pst export RUN --push-to-hub NAME/REPO --yes"
    )


@verb(
    "export the student as a plain Hugging Face model or a GGUF file",
    "pst export runs/demo/pst --gguf q8_0",
    CONFIG,
    OVERRIDES,
    REBUILD,
    Option(
        "--gguf",
        nargs="?",
        const="q8_0",
        choices=_TYPES,
        help="also write RUN/gguf/TYPE for llama.cpp and Ollama, and compare its answers (default type q8_0)",
    ),
    Option(
        "--compare-rows",
        type=int,
        default=200,
        metavar="N",
        help="maximum number of test rows that --gguf compares (default %(default)s)",
    ),
    Option(
        "--adapter",
        action="store_true",
        help="write only the adapter of a LoRA student, as a PEFT folder (RUN/adapter)",
    ),
    Option("--license", metavar="ID", help="the licence to name in the model card, for example apache-2.0"),
    Option("--push-to-hub", metavar="NAME/REPO", help="show what would be uploaded; with --yes, upload it"),
    Option("--yes", action="store_true", help="really upload, with the token in HF_TOKEN"),
    Option("--public", action="store_true", help="allow a public repository; without this, a new one is private"),
    Option(
        "--lm-eval",
        action="store_true",
        help="also write the test rows as a task for the lm-evaluation-harness, and print its command",
    ),
    more=_more,
)
def export(arguments: argparse.Namespace) -> int:
    from pst_dist.config.run_dir import expand_arms
    from pst_dist.publish.export import export

    configs = expand_arms(finished_config_of(arguments, "export --lm-eval" if arguments.lm_eval else "export"))
    if arguments.push_to_hub and len(configs) > 1:
        raise ConfigError("--push-to-hub takes one student, and this run has several arms", "name the arm's directory")
    for config in configs:
        if arguments.adapter:
            from pst_dist.publish.adapter import export_adapter

            print(export_adapter(config, rebuild=arguments.rebuild))
            continue
        folder = export(config, rebuild=arguments.rebuild, licence=arguments.license)
        print(folder)
        files = []
        if arguments.gguf:
            from pst_dist.publish.gguf.artefact import export_gguf

            made = export_gguf(config, arguments.gguf, compare_rows=arguments.compare_rows, rebuild=arguments.rebuild)
            print("\n".join(made.lines()))
            files.append(made.file.parent)
        if arguments.lm_eval:
            from pst_dist.publish.lm_eval import lm_eval_command, write_lm_eval_task

            print(f"{write_lm_eval_task(config)}\n  {lm_eval_command(config)}")
        if arguments.push_to_hub:
            from pst_dist.publish.hub import plan, push

            planned = plan(folder, arguments.push_to_hub, private=not arguments.public, gguf=files)
            print("\n".join(planned.lines()))
            print(push(planned) if arguments.yes else "nothing was sent; add --yes to upload")
    return 0
