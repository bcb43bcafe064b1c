# %% [markdown]
# # A student in one minute
#
# This walk-through trains a small student on rows made here, looks at its scores, asks it questions, and goes on with
# the training. Run it as a script (`python docs/walkthrough.py`), or open it as a notebook: editors that know `# %%`
# cells show it as one, and `jupytext --to notebook docs/walkthrough.py` converts it. It writes to `runs/walkthrough`.

# %%
import random

import pst_dist

# %% [markdown]
# ## Rows
#
# A row has a question, an answer and a teacher's rationale. Here the teacher is a rule that knows animals. Your rows
# can be a list of dicts like these, a pandas frame or a `datasets.Dataset`; the path of a file works too.

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
# dicts. `columns` says where question, answer and rationale are; a dot goes into a nested column. The rows are written
# once below the output directory, so the run can go on later, also from the command line.

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
# A setting that does not exist is an error at once, and the message says what was probably meant:

# %%
try:
    pst_dist.load_config(config, train={"lerning_rate": 1e-3})
except pst_dist.PstError as error:
    print(error)

# %% [markdown]
# ## The run
#
# `run` makes shards, embeds the rationales, trains each arm, scores the test rows, exports the students and writes a
# report. Arm `pst` learns to answer first and then to explain; arm `answer_only` sees no rationale.

# %%
result = pst_dist.run(config)

# %% [markdown]
# ## Results
#
# Results are typed, and each level converts to a pandas frame: the arms, the scored rows of one arm, and the logged
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
# `ask` answers one question, with the rationale on request; `ask_many` answers a list in batches. Both return answers
# with their tokens and the probability that the student gives them.

# %%
student = pst_dist.load_student(result["pst"].output_dir)
answer = student.ask("How many legs has a large grey owl?", explain=True, max_new_tokens=60)
print(answer.text, f"({answer.probability:.2f})", answer.rationale)
for row, answer in zip(test_rows[:3], student.ask_many([row["prompt"] for row in test_rows[:3]]), strict=True):
    print(row["prompt"], answer.text, "right" if answer.text == str(row["gold"]) else "wrong")

# %% [markdown]
# ## Resuming
#
# The run directory is all that is needed to go on. What is complete is skipped, so this trains nothing:

# %%
again = pst_dist.run("runs/walkthrough")
print(again.arms == result.arms)

# %% [markdown]
# An interrupted run (Ctrl-C, a crash, a full disk) goes on from its newest checkpoint in the same way. More steps are a
# change of settings, which `accept_changes` allows. Each arm has a directory of its own, and its training goes on from
# step 100:

# %%
longer = pst_dist.run("runs/walkthrough/pst", train={"max_steps": 120, "accept_changes": True})
print(longer.to_frame()[["arm", "steps", "accuracy", "accuracy_stderr"]].to_string(index=False))

# %% [markdown]
# The command line works on the same directory: `pst report runs/walkthrough`, `pst answer runs/walkthrough/pst "..."`.
