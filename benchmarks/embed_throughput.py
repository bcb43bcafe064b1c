"""Texts per second of pst_dist's encoder against SentenceTransformer.encode, on the same texts in the same process.

    python benchmarks/embed_throughput.py [--texts 512] [--rounds 5] [--threads 1] [--device cpu] [--output FILE]

The texts are made here: worked-out sums of 1 to 12 steps, lengths spread as rationales' are. Two sets are timed:
`repeats` (a fifth of the texts are copies, as templated rationales have) and `distinct` (no copies, so only the
batching counts). Within a round both encoders run one after the other, the first one alternating, and the
ratio of their speeds is taken per round; the median of those ratios is the result, which a busy machine hardly
moves. Both give the same vectors: the largest difference is reported. Writes JSON and prints it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from pathlib import Path


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


def main() -> None:
    """Time both encoders in turn and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-tokens", type=int, default=None)
    parser.add_argument("--output", type=Path, default=Path("embed_throughput.json"))
    args = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import numpy as np
    import torch
    from sentence_transformers import SentenceTransformer

    from pst_dist.config.run_dir import environment
    from pst_dist.config.schema import EmbedConfig
    from pst_dist.embedding.encoder import TextEncoder
    from pst_dist.models.locate import locate_encoder
    from pst_dist.storage.manifest import write_json

    torch.set_num_threads(args.threads)
    budget = {"batch_tokens": args.batch_tokens} if args.batch_tokens else {}
    ours = TextEncoder(EmbedConfig(**budget), device=args.device)
    stock = SentenceTransformer(str(locate_encoder("minilm")), device=args.device, local_files_only=True)
    contenders = {
        "pst_dist": ours.encode,
        "sentence_transformers": lambda texts: stock.encode(texts, show_progress_bar=False),
    }
    results = {}
    for kind, repeats in (("repeats", 0.2), ("distinct", 0.0)):
        texts = make_texts(args.texts, repeats, seed=len(kind))
        tokens = [len(ids) for ids in stock.tokenizer(texts)["input_ids"]]
        vectors = {name: encode(texts[:64]) for name, encode in contenders.items()}  # warm-up
        speeds: dict[str, list[float]] = {name: [] for name in contenders}
        for number in range(args.rounds):
            for name in sorted(contenders, reverse=bool(number % 2)):
                begin = time.perf_counter()
                vectors[name] = contenders[name](texts)
                speeds[name].append(len(texts) / (time.perf_counter() - begin))
        ratios = [a / b for a, b in zip(speeds["pst_dist"], speeds["sentence_transformers"], strict=True)]
        results[kind] = {
            "texts": len(texts),
            "distinct_texts": len(set(texts)),
            "tokens_min_median_max": [min(tokens), statistics.median(tokens), max(tokens)],
            "texts_per_second": {name: round(statistics.median(values), 1) for name, values in speeds.items()},
            "ratio_median": round(statistics.median(ratios), 3),
            "ratio_min_max": [round(min(ratios), 3), round(max(ratios), 3)],
            "largest_difference": float(np.abs(vectors["pst_dist"] - vectors["sentence_transformers"]).max()),
        }
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else _processor()
    report = {
        "device": device,
        "threads": args.threads,
        "rounds": args.rounds,
        "batch_tokens": ours.identity["batch_tokens"],
        "results": results,
        "environment": environment(),
    }
    write_json(args.output, report)
    print(json.dumps(report, indent=2))


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown processor"


if __name__ == "__main__":
    main()
