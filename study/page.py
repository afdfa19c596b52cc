"""The page of a study: a table, a picture and verdicts for each claim.

A picture has panels {title: (x, [(name, [values of each x])])}. `done` is {cell: {seed: Run}}, see claims.py.
"""

import json
import math
import statistics

import matplotlib.pyplot as plt

from data import OTHERS, load_corpus
from encoders import MODALITIES
from study.claims import SNRS, claims_of, compare, experts, read_run, spread, usage, wers

COLOURS = {"mlp": "0.6", "jejr": "C4", "jedr": "C6", "dedr": "C2", "dense": "C9", "top-1": "#98df8a", "top-2": "C2"}
COLOURS |= {"audio": "C0", "video": "C1"}


def panels_of(name, done, claim):
    """The panels of a claim's picture."""
    if name == "usage":
        panels = {}
        for cell in claim.cells:
            usage = {m: r["usage"] for m, r in done[cell][0].results["routing"].items()}
            title = cell.projector.upper() + ("" if cell.balance else ", no balancing") + ": tokens (%) by expert"
            panels[title] = range(1, 1 + cell.num_experts), [(m, [[100 * u] for u in us]) for m, us in usage.items()]
        return panels
    if name == "noise":
        names = {c: f"{c.task.upper()} {c.projector.upper()}" for c in claim.cells}
        at = {c: SNRS if c.task != "vsr" else ["clean"] * len(SNRS) for c in claim.cells}  # no sound, no SNR
        series = [(name, [wers(done, c, snr) for snr in at[c]]) for c, name in names.items()]
        return {"WER (%) by SNR (dB)": (SNRS, series)}
    if name in ("experts", "data"):
        mlp, *mixtures = claim.cells
        lines = {"mlp": [mlp] * 4} | {f"top-{k}": [c for c in mixtures if c.top_k == k] for k in (1, 2)}
        x = [2, 4, 8, 16]
        if name == "data":
            lines = {"mlp": claim.cells[::2], "dedr": claim.cells[1::2]}
            x = [len(load_corpus(done[cell][0].results["data"], "train")[0]) for cell in lines["mlp"]]
        panels, by = {}, "experts" if name == "experts" else "train clips"
        for snr in claim.snrs:
            series = [(line, [wers(done, cell, snr) for cell in cells]) for line, cells in lines.items()]
            panels[f"WER (%), {snr}{' dB' * (snr != 'clean')}, by {by}"] = x, series
        return panels
    panels = {}
    for cell in claim.cells:
        snrs = claim.snrs if "audio" in MODALITIES[cell.task] else ["clean"]
        _, series = panels.setdefault(f"{cell.task.upper()}, {cell.llm} LLM: WER (%) by SNR (dB)", (snrs, []))
        line = "dense" if cell.num_experts == cell.top_k else cell.projector
        series.append((line, [wers(done, cell, snr) for snr in snrs]))
    return panels


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


def write(runs, args):
    """NAME.md, NAME.json and the pictures. runs: {(cell, seed): folder}."""
    args.out.mkdir(parents=True, exist_ok=True)
    done, numbers = {}, {}
    for (cell, seed), folder in runs.items():
        run = done.setdefault(cell, {})[seed] = read_run(folder)
        numbers[folder.name] = {"wer": run.wers["test"], "others": run.wers[OTHERS], "parameters": run.sizes}
        numbers[folder.name] |= {"routing": run.results["routing"]}
    about = {"name": args.name, "runs": len(runs)} | {key: run.results[key] for key in ("device", "clips", "num_beams")}
    head = "{runs} runs, on {device}; {clips} test clips, {num_beams} beam(s)".format(**about)
    lines, claims = [f"# {args.name}\n", f"{head}. Written by `study/reproduce.py`; study/README.md explains it.\n"], {}
    for name, claim in claims_of(args).items():
        columns, verdicts = {"experts": experts, "usage": usage}.get(name, lambda *_: ({}, []))(done, claim, args)
        others = ["other talkers, clean", "0 dB"] if wers(done, claim.cells[0], "clean", OTHERS) else []
        table = [["", *claim.snrs, *others, "seeds", "trained", "projector", "active", *columns]]
        for cell in claim.cells:
            row = [str(cell), *(spread(wers(done, cell, snr)) for snr in claim.snrs)]
            row += [spread(wers(done, cell, snr, OTHERS)) for snr in ("clean", "0")[: len(others)]]
            row += [str(len(done[cell])), *(f"{n / 1e6:.2f}" for n in done[cell][0].sizes.values())]
            table.append(row + [texts.get(cell, "–") for texts in columns.values()])
        verdicts = [compare(done, *pair, claim.over) for pair in claim.pairs] + verdicts
        claims[name] = {"paper": claim.paper, "table": table, "verdicts": verdicts}
        figure = draw(panels_of(name, done, claim), lines=name in ("noise", "experts", "data"))
        figure.savefig(args.out / f"{args.name}-{name}.png", dpi=150, bbox_inches="tight")
        lines += [f"## {name.capitalize()}\n", f"{claim.paper}\n"]
        lines += [f"| {' | '.join(row)} |" for row in [table[0], ["---"] * len(table[0]), *table[1:]]]
        lines += ["", f"![{name}]({args.name}-{name}.png)\n"]
        for verdict in verdicts:
            on_others = verdict[OTHERS]["text"] if OTHERS in verdict else ""
            lines.append(f"- {verdict['text']}: **{verdict['verdict']}**{on_others}")
        lines.append("")
    (args.out / f"{args.name}.md").write_text("\n".join(lines), encoding="utf-8")
    about |= {"claims": claims, "results": numbers}
    (args.out / f"{args.name}.json").write_text(json.dumps(about, indent=1) + "\n")
    print(f"wrote {args.out / args.name}.md, .json and pictures")
