# %% [markdown]
# # A student in one minute
#
# This walk-through generates rows, trains a small student on them, looks at its scores, asks it questions and resumes
# the training. Run it as a script (`python docs/walkthrough.py`) or as a notebook: editors that support `# %%` cells
# open it as one, and `jupytext --to notebook docs/walkthrough.py` converts it. It writes to `runs/walkthrough`.

# %%
import random

import pst_dist

# %% [markdown]
# ## Rows
#
# A row has a question, an answer and a teacher's rationale. Here a simple rule plays the teacher. Your rows can be a
# list of dicts like these, a pandas frame, a `datasets.Dataset` or the path of a file.

# %%
KINDS = {
    "bird": (2, ["robin", "crow", "owl", "duck"]),
    "mammal": (4, ["cat", "horse", "mouse", "bear"]),
    "insect": (6, ["ant", "bee", "moth", "wasp"]),
}
rows = [
    {
        "prompt": f"How many legs has a {size} {colour} {animal}?",
        "gold": legs,
        "teacher": {"name": "rule", "says": f"A {animal} is a kind of {kind}, and a {kind} has {legs} legs."},
    }
    for kind, (legs, animals) in KINDS.items()
    for animal in animals
    for size in ("small", "large", "young", "old", "slow")
    for colour in ("black", "brown", "grey", "red", "white")
]
random.Random(0).shuffle(rows)
train_rows, test_rows = rows[:240], rows[240:300]
print(rows[0])

# %% [markdown]
# ## A config
#
# `load_config` takes a ready-made config, a YAML file or a run directory, or starts from the defaults. Sections are
# dicts. `columns` maps question, answer and rationale to columns; a dot selects a nested value. The rows are written
# once below the output directory, so the run can be resumed later, also from the command line.

# %%
config = pst_dist.load_config(
    arms=["pst", "answer_only"],
    output_dir="runs/walkthrough",
    data={
        "train": train_rows,
        "test": test_rows,
        "columns": {"question": "prompt", "answer": "gold", "rationale": "teacher.says"},
        "answer_type": "number",
        "validation_size": 40,
    },
    student={"fresh": {"hidden_size": 64, "num_layers": 2, "tokenizer": "bpe", "vocab_size": 400}},
    train={"max_steps": 100, "eval_steps": 50, "learning_rate": 5e-3, "logging_steps": 20, "report_to": "none"},
    evaluate={"max_new_tokens": 8, "explain_rows": 8, "latency_rows": 4},
)
print(config.data.train)

# %% [markdown]
# An unknown setting raises an error immediately, and the message suggests the closest known one:

# %%
try:
    pst_dist.load_config(config, train={"lerning_rate": 1e-3})
except pst_dist.PstError as error:
    print(error)

# %% [markdown]
# ## The run
#
# `run` writes shards, embeds the rationales, trains each arm, scores the test rows, exports the students and writes a
# report. Arm `pst` learns to answer first and then to explain; arm `answer_only` sees no rationale.

# %%
result = pst_dist.run(config)

# %% [markdown]
# ## Results
#
# Results are typed, and each level converts to a pandas frame: the arms, the scored rows of an arm, and the logged
# steps of its training.

# %%
print(result.to_frame()[["arm", "rows", "accuracy", "accuracy_stderr", "tokens", "best_step"]].to_string(index=False))

# %%
scores = result["pst"].evaluation
print(f"{scores.accuracy:.2f} with standard error {scores.accuracy_stderr:.2f}; {scores.chance=}, {scores.majority=}")
print(scores.to_frame()[["question", "gold", "prediction", "correct"]].head(5).to_string(index=False))

# %%
print(result["pst"].training.to_frame()[["step", "loss", "answer_nll", "alignment"]].to_string(index=False))

# %% [markdown]
# Both arms were scored on the same rows, so they can be compared row by row:

# %%
print(result.compare().table())

# %% [markdown]
# ## Asking the student
#
# `ask` answers one question, on request with a rationale; `ask_many` answers a list in batches. An answer includes its
# token count and the probability that the student assigns to it.

# %%
student = pst_dist.load_student(result["pst"].output_dir)
answer = student.ask("How many legs has a large grey owl?", explain=True, max_new_tokens=60)
print(answer.text, f"({answer.probability:.2f})", answer.rationale)
for row, answer in zip(test_rows[:3], student.ask_many([row["prompt"] for row in test_rows[:3]]), strict=True):
    print(row["prompt"], answer.text, "right" if answer.text == str(row["gold"]) else "wrong")

# %% [markdown]
# ## Resuming
#
# The run directory is all you need to resume. Completed stages are skipped, so this trains nothing:

# %%
again = pst_dist.run("runs/walkthrough")
print(again.arms == result.arms)

# %% [markdown]
# An interrupted run (Ctrl-C, a crash, a full disk) resumes from its newest checkpoint in the same way. More steps are a
# changed setting, which `accept_changes` allows. Each arm has its own directory, and its training resumes from step
# 100:

# %%
longer = pst_dist.run("runs/walkthrough/pst", train={"max_steps": 120, "accept_changes": True})
print(longer.to_frame()[["arm", "steps", "accuracy", "accuracy_stderr"]].to_string(index=False))

# %% [markdown]
# The command line uses the same directory: `pst report runs/walkthrough`, `pst answer runs/walkthrough/pst "..."`.
