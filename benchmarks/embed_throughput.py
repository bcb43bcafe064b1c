"""Texts per second of our encoder, by each engine and precision, and of SentenceTransformer.encode on the same texts.

    python benchmarks/embed_throughput.py [--texts 512] [--rounds 5] [--threads 1] [--device cpu] [--output FILE]

The texts are made here: worked-out sums of 1 to 12 steps, lengths spread as rationales' are. Two sets are timed:
`repeats` (a fifth of the texts are copies, as templated rationales have) and `distinct` (no copies, so only the
batching counts). Within a round all run one after the other, in an order that rotates, and each ratio is taken within
a round; the median of those ratios is the result, which a busy machine hardly moves. With one thread on a CPU, time is
what the process computed, otherwise what passed. Cosines are to SentenceTransformer's vectors in float32. Engines that
are not installed are named and skipped. Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

STOCK = "SentenceTransformer"


def make_texts(count: int, repeats: float, seed: int = 0) -> list[str]:
    """`count` worked-out sums; a share `repeats` of them are copies of others."""
    rng = random.Random(seed)
    names = ["Ann", "Ben", "Cora", "Dev", "Ela", "Finn", "Gita", "Hugo"]
    things = ["apples", "marbles", "tickets", "stamps", "shells", "pencils", "coins", "tiles"]
    verbs = {"+": ["finds", "buys", "is given"], "-": ["loses", "sells", "gives away"]}
    texts: list[str] = []
    while len(texts) < count:
        if texts and rng.random() < repeats:
            texts.append(rng.choice(texts))
            continue
        name, thing, total = rng.choice(names), rng.choice(things), rng.randint(20, 400)
        parts = [f"{name} starts with {total} {thing}."]
        for _ in range(min(12, 1 + int(rng.expovariate(1 / 3)))):
            sign, amount = rng.choice("+-"), rng.randint(1, 19)
            after = total + amount if sign == "+" else total - amount
            verb = rng.choice(verbs[sign])
            parts.append(f"Then {name} {verb} {amount} {thing}, so there are {total} {sign} {amount} = {after} now.")
            total = after
        texts.append(" ".join(parts) + f" The answer is {total}.")
    return texts


def contenders_of(device: str, batch_tokens: int | None) -> dict[str, Callable[[list[str]], Any]]:
    """Name -> what turns texts into vectors; SentenceTransformer first, what is not installed left out by name."""
    from sentence_transformers import SentenceTransformer

    from pst_dist.config.schema import EmbedConfig
    from pst_dist.embedding.encoder import TextEncoder
    from pst_dist.errors import EnvironmentFault
    from pst_dist.models.locate import locate_encoder

    stock = SentenceTransformer(str(locate_encoder("minilm")), device=device, local_files_only=True)
    found: dict[str, Callable[[list[str]], Any]] = {STOCK: partial(stock.encode, show_progress_bar=False)}
    engines = ["torch"] if device != "cpu" else ["torch", "openvino"]
    for engine in engines:
        for dtype in ("float32", "bfloat16", "int8") if engine != "torch" else ("float32", "bfloat16"):
            settings: dict[str, Any] = {"engine": engine, "dtype": dtype}
            if batch_tokens:
                settings["batch_tokens"] = batch_tokens
            try:
                found[f"{engine}, {dtype}"] = TextEncoder(EmbedConfig(**settings), device=device).encode
            except EnvironmentFault as error:
                print(f"left out: {error}")
    return found


def measure(contenders: dict[str, Callable[[list[str]], Any]], texts: list[str], rounds: int, clock: str) -> Any:
    """Contender -> texts per second, its speed over SentenceTransformer's, and its cosine to those vectors."""
    from measuring import CLOCKS, paired_rounds

    exact = contenders[STOCK](texts)  # also warms up
    cosines = {name: (encode(texts) * exact).sum(1) for name, encode in contenders.items()}
    seconds = paired_rounds(
        {name: partial(encode, texts) for name, encode in contenders.items()}, rounds, CLOCKS[clock]
    )
    table = {}
    for name, values in seconds.items():
        ratios = [stock / mine for stock, mine in zip(seconds[STOCK], values, strict=True)]
        table[name] = {
            "texts_per_second": round(len(texts) / statistics.median(values), 1),
            "ratio_median": round(statistics.median(ratios), 3),
            "ratio_min_max": [round(min(ratios), 3), round(max(ratios), 3)],
            "cosine_mean_min": [round(float(cosines[name].mean()), 6), round(float(cosines[name].min()), 6)],
        }
    return table


def main() -> None:
    """Time all in turn, print the table and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-tokens", type=int, default=None)
    parser.add_argument("--output", type=Path, default=Path("embed_throughput.json"))
    args = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch
    from measuring import machine

    from pst_dist.logs import quiet_libraries
    from pst_dist.storage.manifest import write_json

    quiet_libraries()
    torch.set_num_threads(args.threads)
    clock = "cpu" if args.threads == 1 and args.device == "cpu" else "wall"
    contenders = contenders_of(args.device, args.batch_tokens)
    results = {}
    for kind, repeats in (("repeats", 0.2), ("distinct", 0.0)):
        texts = make_texts(args.texts, repeats, seed=len(kind))
        results[kind] = {"texts": len(texts), "distinct_texts": len(set(texts))}
        results[kind]["results"] = table = measure(contenders, texts, args.rounds, clock)
        print(f"{kind}: {len(texts)} texts, {len(set(texts))} of them distinct; {clock} seconds")
        print(f"{'':22}{'texts/s':>9}{'ratio':>8}{'range':>17}{'cosine':>10}{'lowest':>10}")
        for name, row in table.items():
            low, high = row["ratio_min_max"]
            mean, lowest = row["cosine_mean_min"]
            print(
                f"{name:22}{row['texts_per_second']:>9}{row['ratio_median']:>8}{f'{low} to {high}':>17}"
                f"{mean:>10.5f}{lowest:>10.5f}"
            )
    settings = {name: value for name, value in vars(args).items() if name != "output"}
    packages = ("sentence-transformers", "openvino", "nncf")
    report = {"machine": machine(torch.device(args.device), packages), "settings": settings, "clock": clock}
    write_json(args.output, report | {"results": results})


if __name__ == "__main__":
    main()
