"""The page of a study: a table, a picture and verdicts for each claim.

A picture has panels {title: (x, [(name, [values of each x])])}. `done` is {cell: {seed: Run}}, see claims.py.
"""

import json
import math
import statistics

import matplotlib.pyplot as plt

from data import OTHERS, load_corpus
from study.claims import SNRS, claims_of, compare, expert_usage, more_experts, read_run, spread, wers

COLOURS = {"mlp": "0.6", "jejr": "C4", "jedr": "C6", "dedr": "C2", "dense": "C9", "top-1": "#98df8a", "top-2": "C2"}
COLOURS |= {"audio": "C0", "video": "C1"}


def wer_panels(done, claim):
    """For each task and LLM, bars by SNR."""
    panels = {}
    for cell in claim.cells:
        snrs = claim.snrs if cell.task != "vsr" else ["clean"]
        _, series = panels.setdefault(f"{cell.task.upper()}, {cell.llm} LLM: WER (%) by SNR (dB)", (snrs, []))
        line = "dense" if cell.num_experts == cell.top_k else cell.projector
        series.append((line, [wers(done, cell, snr) for snr in snrs]))
    return panels


def noise_panels(done, claim):
    series = []
    for cell in claim.cells:
        at = SNRS if cell.task != "vsr" else ["clean"] * len(SNRS)  # no sound, no SNR
        series.append((f"{cell.task.upper()} {cell.projector.upper()}", [wers(done, cell, snr) for snr in at]))
    return {"WER (%) by SNR (dB)": (SNRS, series)}


def usage_panels(done, claim):
    panels = {}
    for cell in claim.cells:
        title = cell.projector.upper() + ("" if cell.balance else ", no balancing") + ", seed 0: tokens (%) by expert"
        routing = done[cell][0].results["routing"]
        series = [(modality, [[100 * share] for share in r["usage"]]) for modality, r in routing.items()]
        panels[title] = range(1, 1 + cell.num_experts), series
    return panels


def experts_panels(done, claim):
    mlp, *mixtures = claim.cells
    lines = {"mlp": [mlp] * 4} | {f"top-{k}": [c for c in mixtures if c.top_k == k] for k in (1, 2)}
    return line_panels(done, claim, lines, [2, 4, 8, 16], "experts")


def data_panels(done, claim):
    lines = {"mlp": claim.cells[::2], "dedr": claim.cells[1::2]}
    x = [len(load_corpus(done[cell][0].results["data"], "train")[0]) for cell in lines["mlp"]]
    return line_panels(done, claim, lines, x, "train clips")


def line_panels(done, claim, lines, x, by):
    panels = {}
    for snr in claim.snrs:
        series = [(line, [wers(done, cell, snr) for cell in cells]) for line, cells in lines.items()]
        panels[f"WER (%), {snr}{' dB' * (snr != 'clean')}, by {by}"] = x, series
    return panels


PANELS = {"noise": noise_panels, "usage": usage_panels, "experts": experts_panels, "data": data_panels}
MEASURES = {"usage": expert_usage, "experts": more_experts}


def draw(panels, lines):
    """Lines or grouped bars: the mean of each list of values, and its standard deviation."""
    fig, axes = plt.subplots(1, len(panels), figsize=(3.8 * len(panels), 3), squeeze=False, layout="constrained")
    for ax, (title, (groups, series)) in zip(axes[0], panels.items()):
        for i, (name, values) in enumerate(series):
            means = [statistics.mean(v) if v else math.nan for v in values]
            style = {"yerr": [statistics.stdev(v) if len(v) > 1 else math.nan for v in values], "capsize": 2}
            style |= {"color": COLOURS.get(name), "label": name}
            if lines:
                ax.errorbar(range(len(groups)), means, marker=".", **style)
            else:
                x = [at + (i - (len(series) - 1) / 2) * 0.8 / len(series) for at in range(len(groups))]
                ax.bar(x, means, 0.8 / len(series), **style)
        ax.set(title=title, xticks=range(len(groups)), xticklabels=groups, ylim=(0, None))
    handles = {label: handle for ax in axes[0] for handle, label in zip(*ax.get_legend_handles_labels())}
    fig.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=4, frameon=False)
    return fig


# --- the page ----------------------------------------------------------------------------------------------------


def rows_of(done, claim, columns):
    """The rows of a claim's table, with further `columns` {header: {cell: text}}."""
    others = ["clean", "0"] if wers(done, claim.cells[0], "clean", OTHERS) else []
    head = ["", *claim.snrs, *(f"others, {snr}" for snr in others), "seeds", "trained", "projector", "active", *columns]
    rows = [head, ["---"] * len(head)]
    for cell in claim.cells:
        row = [str(cell), *(spread(wers(done, cell, snr)) for snr in claim.snrs)]
        row += [spread(wers(done, cell, snr, OTHERS)) for snr in others]
        row += [str(len(done[cell])), *(f"{n / 1e6:.2f}" for n in done[cell][0].sizes.values())]
        rows.append(row + [texts.get(cell, "–") for texts in columns.values()])
    return rows


def write(runs, args):
    """NAME.md, NAME.json (the numbers of each run) and the pictures. runs: {(cell, seed): folder}."""
    args.out.mkdir(parents=True, exist_ok=True)
    done, numbers = {}, {}
    for (cell, seed), folder in runs.items():
        run = done.setdefault(cell, {})[seed] = read_run(folder)
        numbers[folder.name] = {"wer": run.wers["test"], "others": run.wers[OTHERS], "parameters": run.sizes}
        numbers[folder.name] |= {"routing": run.results["routing"]}
    head = "on {device}; {clips} test clips, {num_beams} beam(s)".format(**run.results)
    lines = [
        f"# {args.name}",
        f"{len(runs)} runs, {head}. Written by `study/reproduce.py`; study/README.md explains it.",
    ]
    for name, claim in claims_of(args).items():
        columns, verdicts = MEASURES[name](done, claim, args) if name in MEASURES else ({}, [])
        table = "\n".join(f"| {' | '.join(row)} |" for row in rows_of(done, claim, columns))
        lines += [f"## {name.capitalize()}", claim.paper, table]
        figure = draw(PANELS.get(name, wer_panels)(done, claim), lines=name in ("noise", "experts", "data"))
        figure.savefig(args.out / f"{args.name}-{name}.png", dpi=150, bbox_inches="tight")
        lines.append(f"![{name}]({args.name}-{name}.png)")
        verdicts = [compare(done, *pair, claim.over) for pair in claim.pairs] + verdicts
        lines.append("\n".join(f"- {verdict}" for verdict in verdicts))
    (args.out / f"{args.name}.md").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    (args.out / f"{args.name}.json").write_text(json.dumps(numbers, indent=1) + "\n")
    print(f"wrote {args.out / args.name}.md, .json and pictures")
