"""The paper's claims: what is compared for each, and the tables, verdicts and pictures of the finished runs.

`reproduce.py` trains the runs and calls `write`. A cell is a model of the study; with a seed it is a run of train.py.
`word_errors`, `experts` and `usage` find what a claim needs: further columns {header: {cell: text}}, further verdicts, and
the panels of a picture {title: (groups of bars, [(name, [values of each group])])}. Their `done` is {cell: {seed: Run}}.
"""

import json
import math
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch

from data import ClipDataset, collate, load_corpus
from eval import bootstrap, count_errors
from model import MODALITIES, LlamaSMoP

SNRS, NOISY, MAIN = "clean 5 2.5 0 -2.5 -5".split(), "5 2.5 0 -2.5 -5".split(), "clean 0 -5".split()
LEAST_SEEDS = 3  # for a verdict on a difference of WER: from scratch, a seed may stay on a plateau or leave it
COLOURS = {"mlp": "0.6", "jejr": "C4", "jedr": "C6", "dedr": "C2", "top-1": "#98df8a", "top-2": "C2"}
COLOURS |= {"audio": "C0", "video": "C1"}


class Cell(NamedTuple):
    task: str
    projector: str
    num_experts: int = 4
    top_k: int = 2
    llm: str = "small"
    balance: bool = True

    def words(self):
        experts = [] if self.projector == "mlp" else [f"e{self.num_experts}", f"k{self.top_k}"]
        return [self.task, self.projector, *experts, *([] if self.balance else ["unbalanced"]), self.llm]

    def __str__(self):
        return " ".join([self.task.upper(), self.projector.upper(), *self.words()[2:]])


class Claim(NamedTuple):
    paper: str
    cells: list
    pairs: list  # (a, b): is the WER of a lower than that of b?
    snrs: list = MAIN  # columns of the table
    over: list = MAIN  # the pairs are compared over these together


ASR_MLP, ASR_DEDR, VSR_MLP, ENCODER = (Cell(task, p) for task in ("asr", "vsr") for p in ("mlp", "dedr"))
MLP, JEJR, JEDR, DEDR = (Cell("avsr", p) for p in ("mlp", "jejr", "jedr", "dedr"))
UNBALANCED = DEDR._replace(balance=False)
QUICK_CELLS = {ASR_DEDR, MLP, JEJR, JEDR, DEDR, UNBALANCED}
CLAIMS = ["configurations", "sizes", "experts", "usage", "noise"]


def claims_of(args):
    """{name: Claim} of --claims with its cells of --tasks; with --quick, of few cells."""
    task = next(task for task in ("avsr", "asr", "vsr") if task in args.tasks)  # of sizes and experts
    mlps, dedrs = ([Cell(task, p, llm=llm) for llm in args.llms] for p in ("mlp", "dedr"))
    mixtures = [Cell(task, "dedr", e, k) for e in (2, 4, 8, 16) for k in (1, 2)]
    claims = {
        "configurations": Claim(
            "of the projectors, DEDR gives the lowest WER, for ASR, VSR and AVSR.",
            [ASR_MLP, ASR_DEDR, VSR_MLP, ENCODER, MLP, JEJR, JEDR, DEDR],
            [(ASR_DEDR, ASR_MLP), (ENCODER, VSR_MLP), (DEDR, MLP), (DEDR, JEJR), (DEDR, JEDR)],
        ),
        "sizes": Claim(
            "with a mixture of projectors, smaller LLMs stay strong.",
            [cell for pair in zip(mlps, dedrs) for cell in pair],
            [*zip(dedrs, mlps), *zip(dedrs, mlps[1:])],
        ),
        "experts": Claim(
            "more experts add capacity at no cost of inference.",
            [Cell(task, "mlp"), *mixtures],
            [(cell, Cell(task, "mlp")) for cell in mixtures],
        ),
        "usage": Claim(
            "all experts are used, by each modality in its own way.",
            [DEDR, UNBALANCED, JEDR, JEJR],
            [(DEDR, UNBALANCED)],
        ),
        "noise": Claim(
            "the mixture is robust to noise.",
            [ASR_MLP, ASR_DEDR, MLP, DEDR],
            [(DEDR, MLP), (ASR_DEDR, ASR_MLP), (MLP, ASR_MLP), (DEDR, ASR_DEDR)],
            SNRS,
            NOISY,
        ),
    }
    kept = {}
    for name in args.claims:
        cells = [cell for cell in claims[name].cells if cell.task in args.tasks]
        if args.quick:
            cells = [cell for cell in cells if cell in QUICK_CELLS and name != "sizes"]
        if pairs := [pair for pair in claims[name].pairs if set(pair) <= set(cells)]:
            kept[name] = claims[name]._replace(cells=cells, pairs=pairs)
    return kept


class Run(NamedTuple):
    folder: Path
    results: dict  # of eval.py
    errors: dict  # {(snr, clip): (word errors, reference words)}
    sizes: dict  # parameters: trained, of these in the projector, of those active for a token


def cached(file, measure):
    """What `measure` gives, kept in the run's folder, so that tables can be made without the weights."""
    if not file.is_file():
        file.write_text(json.dumps(measure()) + "\n")
    return json.loads(file.read_text())


def read_run(folder):
    lines = [json.loads(line) for line in open(folder / "hypotheses.jsonl", encoding="utf-8")]
    errors = count_errors([line["reference"] for line in lines], [line["hypothesis"] for line in lines])
    results = json.loads((folder / "results.json").read_text())
    sizes = cached(folder / "sizes.json", lambda: count_parameters(LlamaSMoP.load(folder)))
    return Run(folder, results, dict(zip([(line["snr"], line["id"]) for line in lines], errors)), sizes)


def count_parameters(model):
    def count(*modules):
        return sum(p.numel() for module in modules for p in module.parameters() if p.requires_grad)

    gate, experts = (next(iter(parts.values())) for parts in (model.projector.gates, model.projector.experts))
    active = count(gate, *experts[: model.projector.top_k])
    return {"trained": count(model), "projector": count(model.projector), "active": active}


def difference(a, b, snrs):
    """WER of `a` minus that of `b` in points, over `snrs` and seeds together; its 95 % interval by a paired bootstrap
    over clips; in how many seeds it is lower. a, b: {seed: {(snr, clip): (errors, words)}}."""
    seeds, clips = a.keys() & b.keys(), {}  # {clip: [(seed, errors of a - errors of b, words)]}
    for seed in seeds:
        for snr, clip in sorted(a[seed].keys() & b[seed].keys()):
            if snr in snrs:
                (errors_a, words), (errors_b, _) = a[seed][snr, clip], b[seed][snr, clip]
                clips.setdefault(clip, []).append((seed, errors_a - errors_b, words))

    def points(sample, seeds=seeds):
        rows = [row for clip in sample for row in clip if row[0] in seeds]
        return 100 * sum(more for _, more, _ in rows) / sum(words for _, _, words in rows)

    clips = list(clips.values())
    low, high = bootstrap(clips, points)
    lower = sum(points(clips, {seed}) < 0 for seed in seeds)
    verdict = "open" if len(seeds) < LEAST_SEEDS else "shown" if high < 0 else "opposite" if low > 0 else "not shown"
    found = {"points": round(points(clips), 2), "95": [low, high], "lower": f"{lower} of {len(seeds)}"}
    return found | {"verdict": verdict}


def compare(done, a, b, snrs):
    found = difference(*({seed: run.errors for seed, run in done[cell].items()} for cell in (a, b)), snrs)
    text = "{} against {}: {:+.1f} points of WER [{:+.1f}, {:+.1f}], lower in {} seeds"
    return found | {"text": text.format(a, b, found["points"], *found["95"], found["lower"])}


def wers(done, cell, snr):
    """The WER (%) of each seed."""
    return [run.results["wer"][snr] for run in done[cell].values() if snr in run.results["wer"]]


def spread(values):
    """Mean ± standard deviation over the seeds."""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}" if values else "–"


def decode_ratios(mlp, cell, data, rounds=9):
    """Time to decode 8 test clips as a ratio to the MLP's, of each round, sorted; both in turns in one process."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models, ratios = [LlamaSMoP.load(folder).to(device) for folder in (mlp, cell)], []
    clips, load = load_corpus(data, "test")
    dataset = ClipDataset(clips[:8], load, MODALITIES["avsr"])
    batch = collate([dataset[i] for i in range(len(dataset))])
    for _ in range(rounds + 2):
        at = [time.perf_counter()]
        for model in models:
            model.generate_ids(batch, max_new_tokens=16, min_new_tokens=16).cpu()  # equal lengths; waits for a GPU
            at.append(time.perf_counter())
        ratios.append((at[2] - at[1]) / (at[1] - at[0]))
    return sorted(ratios[2:])  # the first two warm up


def word_errors(done, claim, args):
    panels = {}
    for cell in claim.cells:
        snrs = claim.snrs if "audio" in MODALITIES[cell.task] else ["clean"]
        _, series = panels.setdefault(f"{cell.task.upper()}, {cell.llm} LLM: WER (%)", (snrs, []))
        series.append((cell.projector, [wers(done, cell, snr) for snr in snrs]))
    return {}, [], panels


def experts(done, claim, args):
    mlp, *mixtures = claim.cells
    ratios, texts, verdicts = {}, {}, []
    for cell in mixtures:
        folders = [done[c][0].folder for c in (mlp, cell)]
        r = ratios[cell] = cached(folders[1] / "decode.json", lambda: decode_ratios(*folders, args.data))
        texts[cell] = f"{statistics.median(r):.2f} [{r[1]:.2f}, {r[-2]:.2f}]"
        text = f"{cell} decodes in at most 1.1 times the MLP's time: {texts[cell]}"
        verdict = "shown" if r[-2] <= 1.1 else "opposite" if r[1] > 1.1 else "not shown"
        verdicts.append({"text": text, "verdict": verdict})
    measures = {
        "WER (%), clean": {c: wers(done, c, "clean") for c in claim.cells},
        "WER (%) at -5 dB": {c: wers(done, c, "-5") for c in claim.cells},
        "projector (M parameters)": {c: [done[c][0].sizes["projector"] / 1e6] for c in claim.cells},
        "decode time / MLP's": {mlp: [1]} | {c: [statistics.median(r)] for c, r in ratios.items()},
    }
    counts, panels = sorted({cell.num_experts for cell in mixtures}), {}
    for label, values in measures.items():
        panels[f"{label}, by experts"] = counts, [("mlp", [values[mlp] for _ in counts])]
        for k in sorted({cell.top_k for cell in mixtures}):
            panels[f"{label}, by experts"][1].append((f"top-{k}", [values[c] for c in mixtures if c.top_k == k]))
    return {"decode time": texts}, verdicts, panels


def usage(done, claim, args):
    columns, verdicts, panels = {}, [], {}
    for cell in claim.cells:
        routings, even = [run.results["routing"] for run in done[cell].values()], 100 * cell.top_k / cell.num_experts
        shares = {name: [[100 * u for u in routing[name]["usage"]] for routing in routings] for name in routings[0]}
        for name, runs in shares.items():
            used = [[u / sum(run) for u in run if u] for run in runs]
            effective = spread([math.exp(-sum(u * math.log(u) for u in run)) for run in used])
            columns.setdefault(name, {})[cell] = f"{', '.join(f'{u:.0f}' for u in runs[0])}: {effective}"
        rarest = min(u for runs in shares.values() for run in runs for u in run)
        text = f"{cell}: in each modality and seed, each expert is chosen by {even / 4:g} % of the tokens (a quarter "
        text += f"of an even share) or more; the rarest by {rarest:.1f} %"
        verdicts.append({"text": text, "verdict": "shown" if rarest >= even / 4 else "not shown"})
        series = [(name, [[u] for u in runs[0]]) for name, runs in shares.items()]
        title = cell.projector.upper() + ("" if cell.balance else ", no balancing")
        panels[f"{title}: tokens (%) by expert"] = range(1, 1 + cell.num_experts), series
    return columns, verdicts, panels


FINDINGS = {"experts": experts, "usage": usage}  # of the other claims: word_errors


def draw_bars(panels):
    """Grouped bars: the mean of each list of values, and its standard deviation."""
    fig, axes = plt.subplots(1, len(panels), figsize=(3.8 * len(panels), 3), squeeze=False, layout="constrained")
    for ax, (title, (groups, series)) in zip(axes[0], panels.items()):
        for i, (name, values) in enumerate(series):
            x = [at + (i - (len(series) - 1) / 2) * 0.8 / len(series) for at in range(len(groups))]
            means = [statistics.mean(v) if v else math.nan for v in values]
            deviations = [statistics.stdev(v) if len(v) > 1 else math.nan for v in values]
            ax.bar(x, means, 0.8 / len(series), yerr=deviations, capsize=2, color=COLOURS[name], label=name)
        ax.set(title=title, xticks=range(len(groups)), xticklabels=groups, ylim=(0, None))
    handles = {label: handle for ax in axes[0] for handle, label in zip(*ax.get_legend_handles_labels())}
    fig.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=4, frameon=False)
    return fig


def write(runs, commands, args):
    """NAME.md, NAME.json and the pictures. runs, commands: {(cell, seed): ...}."""
    args.out.mkdir(parents=True, exist_ok=True)
    done, numbers, facts = {}, {}, []
    for (cell, seed), folder in runs.items():
        run = done.setdefault(cell, {})[seed] = read_run(folder)
        facts.append(run.results | json.loads((folder / "cell.json").read_text()))
        numbers[folder.name] = run.results | {"data": args.data}  # no path of this machine
        numbers[folder.name] |= {"command": commands[cell, seed], "parameters": run.sizes}
    about = {"name": args.name, "finished": len(runs)}
    for key in ("device", "code", "clips", "num_beams"):
        about[key] = " and ".join(sorted({str(fact[key]) for fact in facts}))
    head = "{finished} runs, on {device}, code {code}; {clips} test clips, {num_beams} beam(s)".format(**about)
    lines, claims = [f"# {args.name}\n", f"{head}. Written by `study/reproduce.py`; study/README.md explains it.\n"], {}
    for name, claim in claims_of(args).items():
        columns, verdicts, panels = FINDINGS.get(name, word_errors)(done, claim, args)
        table = [["", *claim.snrs, "seeds", "trained", "projector", "active", *columns]]
        for cell in claim.cells:
            row = [str(cell), *(spread(wers(done, cell, snr)) for snr in claim.snrs), str(len(done[cell]))]
            row += [f"{n / 1e6:.2f}" for n in done[cell][0].sizes.values()]
            table.append(row + [texts.get(cell, "–") for texts in columns.values()])
        verdicts = [compare(done, *pair, claim.over) for pair in claim.pairs] + verdicts
        claims[name] = {"paper": claim.paper, "table": table, "verdicts": verdicts}
        draw_bars(panels).savefig(args.out / f"{args.name}-{name}.png", dpi=150, bbox_inches="tight")
        lines += [f"## {name.capitalize()}\n", f"The paper: {claim.paper}\n"]
        lines += [f"| {' | '.join(row)} |" for row in [table[0], ["---"] * len(table[0]), *table[1:]]]
        lines += ["", f"![{name}]({args.name}-{name}.png)\n"]
        lines += [f"- {verdict['text']}: **{verdict['verdict']}**" for verdict in verdicts] + [""]
    lines += ["## Commands\n", "Of the first seed; the others have another `--seed`.\n", "```bash"]
    lines += [command for (_, seed), command in commands.items() if seed == 0] + ["```\n"]
    (args.out / f"{args.name}.md").write_text("\n".join(lines), encoding="utf-8")
    about |= {"claims": claims, "runs": numbers}
    (args.out / f"{args.name}.json").write_text(json.dumps(about, indent=1) + "\n")
    print(f"wrote {args.out / args.name}.md, .json and pictures")
