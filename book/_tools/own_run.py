"""The page "Your own run": a notebook made from the folder of a run, executed like every chapter.

The page in git only says that no run has been made. `make book` trains one and puts the page made here in its place,
in the staged copy of the book, so that the checkout stays clean.
"""

from __future__ import annotations

from pathlib import Path

import execute
import nbformat
import normalise
from nbclient import NotebookClient

LOAD = """\
import json
from pathlib import Path

from rlvr_lab.show.theme import band, direct_labels, figure, line

run = Path({run!r})
recorded = Path({recorded!r})


def rows(name):
    return [json.loads(text) for text in (run / name).read_text().splitlines()]


history, evaluations, samples = rows("metrics.jsonl"), rows("evaluations.jsonl"), rows("samples.jsonl")
first, last = evaluations[0], evaluations[-1]
summary = json.loads((run / "summary.json").read_text())
reference = json.loads(recorded.read_text()) if recorded.exists() else None"""

TABLE = """\
names = ["pass@1", "pass@4", "pass@16", "pass@32", "pass@64", "distinct_correct", "token_entropy", "answer_entropy"]
print(f"{'':18}{'before':>10}{'after':>10}{'change':>10}")
for name in names:
    if name in last:
        a, b = first[name], last[name]
        print(f"{name:18}{a:10.3f}{b:10.3f}{b - a:+10.3f}")
machine = summary["machine"]
print(f"\\n{summary['steps']} steps in {summary['seconds_steps']:.0f} s, without the evaluations, on")
print(f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}, {summary['date']}")"""

CURVES = """\
steps = [row["step"] for row in history]


def smooth(name, width=5):
    values = [row[name] for row in history]
    means = [sum(part := values[max(0, i - width + 1) : i + 1]) / len(part) for i in range(len(values))]
    return [round(mean, 4) for mean in means]


traces = [
    line(steps, smooth("reward"), name="reward", series=0),
    line(steps, smooth("token_entropy"), name="token entropy", series=1),
]
fig = figure(
    *traces,
    x="training step",
    y="reward, and entropy (nats)",
    alt=f"Your run: reward goes from {smooth('reward')[4]:.2f} to {smooth('reward')[-1]:.2f}, and token entropy from "
    f"{smooth('token_entropy')[4]:.3f} to {smooth('token_entropy')[-1]:.3f} nats (means of five steps).",
)
direct_labels(fig)"""

PASS = """\
ks = [k for k in (1, 2, 4, 8, 16, 32, 64) if f"pass@{k}" in last]
fig = figure(
    band(ks, [first[f"pass@{k}_interval"][0] for k in ks], [first[f"pass@{k}_interval"][1] for k in ks],
         name="before: 95 % interval over problems", series="baseline"),
    line(ks, [round(first[f"pass@{k}"], 4) for k in ks], name="before", series="baseline"),
    band(ks, [last[f"pass@{k}_interval"][0] for k in ks], [last[f"pass@{k}_interval"][1] for k in ks],
         name="after: 95 % interval over problems", series=0),
    line(ks, [round(last[f"pass@{k}"], 4) for k in ks], name="after", series=0),
    x="k (samples per problem)",
    y="pass@k (share of problems)",
    alt=f"Your run: pass@1 goes from {first['pass@1']:.2f} to {last['pass@1']:.2f} by training, while pass@{ks[-1]} "
    f"goes from {first[f'pass@{ks[-1]}']:.2f} to {last[f'pass@{ks[-1]}']:.2f}.",
    xaxis_type="log",
    xaxis_tickvals=ks,
)
fig"""

WIDGET = """\
from rlvr_lab.show.widgets import PassAtK


def counts(step):
    return [row["correct"] for row in rows(f"evaluations/step_{step:06d}.jsonl")]


PassAtK(samples=last["samples"], base=counts(first["step"]), trained=counts(last["step"]))"""

COMPARE = """\
if reference is None:
    print("no recorded runs to compare with")
else:
    end = str(reference["steps"])
    for name in ("pass@1", "pass@32", "distinct_correct", "token_entropy"):
        values = [seed["evaluations"][end][name] for seed in reference["seeds"]]
        print(f"{name:18}{last[name]:8.3f}   recorded seeds {min(values):.3f} to {max(values):.3f}")"""

TRANSCRIPT = """\
from rlvr_lab.show.transcript import transcript_html
from rlvr_lab.tasks.countdown import token_class

# the response with the most to see: the largest entropy in one token
sample = max(samples, key=lambda row: max(row["token_entropy"]))
words = sample["response"].split()
print(f"step {sample['step']}, problem {sample['problem']}, correct: {sample['correct']}")
spaced = [word + " " for word in words]
transcript_html(spaced, sample["token_entropy"], kinds=token_class(words), title="A response of your run")"""


def build(run: Path, recorded: Path) -> nbformat.NotebookNode:
    """The page as a notebook without outputs."""
    md, code = nbformat.v4.new_markdown_cell, nbformat.v4.new_code_cell
    config = _settings(run)
    cells = [
        md(
            "# Your own run\n\nThis page shows the run that `make book` has just made on this machine: "
            f"{config['steps']} GRPO steps on the tiny lab's base S, seed {config['seed']}. Nothing on it was written "
            "in advance; every figure comes from the files of that run."
        ),
        code(LOAD.format(run=str(run), recorded=str(recorded)), metadata={"tags": ["hide-cell"]}),
        md("## Before and after\n\nThe same held-out problems, sampled before the first and after the last step."),
        code(TABLE, metadata={"tags": ["hide-input"]}),
        md(
            "## Step by step\n\nMeans of five steps, of the responses sampled for training at temperature "
            f"{config['training']:g}; the evaluations on this page are at temperature {config['evaluation']:g}. The "
            "warmer of two has more entropy with the same weights. "
            "{doc}`1_foundations/watching_entropy_collapse` explains the shape."
        ),
        code(CURVES, metadata={"tags": ["hide-input"]}),
        md("## What training bought, and what it cost"),
        code(PASS, metadata={"tags": ["hide-input"]}),
        md("Move k: at which k has the base policy caught up with yours?"),
        code(WIDGET, metadata={"tags": ["hide-input"]}),
        md(
            "## Beside the recorded seeds\n\nThe same recipe, recorded once for several seeds. Another seed or another "
            "processor gives another run; yours should lie near that range."
        ),
        code(COMPARE, metadata={"tags": ["hide-input"]}),
        md("## One response, token by token"),
        code(TRANSCRIPT, metadata={"tags": ["hide-input"]}),
        md(
            "## Again, and otherwise\n\nThe same run from the command line, and one with a wider upper clip bound:\n\n"
            "```bash\nrlvr-lab train grpo/tiny --out runs/again\n"
            "rlvr-lab train grpo/tiny methods.grpo.clip_high=0.28 --out runs/wider\n```\n\n"
            f"All settings lie in `{run.name}/config.yaml`; `rlvr-lab train --settings` lists what can be changed."
        ),
    ]
    return nbformat.v4.new_notebook(
        cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    )


def _settings(run: Path) -> dict[str, float]:
    import yaml

    config = yaml.safe_load((run / "config.yaml").read_text())
    temperatures = {"training": config["rollout"]["temperature"], "evaluation": config["evaluation"]["temperature"]}
    return {"steps": config["steps"], "seed": config["seed"], **temperatures}


def write(run: Path, recorded: Path, page: Path) -> None:
    """Execute the page and write it, normalised, to `page`."""
    notebook = build(run, recorded)
    client = NotebookClient(notebook, timeout=execute.CELL_TIMEOUT_S, kernel_name="python3", store_widget_state=True)
    client.execute()
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(normalise.dumps(notebook), encoding="utf-8")
