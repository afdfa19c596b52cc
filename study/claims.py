"""The paper's claims: what is compared for each, and the tables, verdicts and pictures of the finished runs.

`reproduce.py` trains the runs and calls `write`. A cell is a model of the study; with a seed it is a run of train.py.
"""

import itertools
import json
import math
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from safetensors import safe_open

import synthetic
from data import FPS, TASKS, ClipDataset, collate, load_corpus
from eval import bootstrap, count_errors
from model import LlamaSMoP

SNRS, NOISY, MAIN = "clean 5 2.5 0 -2.5 -5".split(), "5 2.5 0 -2.5 -5".split(), "clean 0 -5".split()
LEAST_SEEDS = 3  # for a verdict on a difference of WER: from scratch, a seed may stay on a plateau or leave it
COLOURS = {
    "mlp": "0.6", "jejr": "C4", "jedr": "C6", "dedr": "C2", "top-1": "#98df8a", "top-2": "C2",
    "audio": "C0", "video": "C1", "experts": ["#264653", "#2a9d8f", "#e9c46a", "#e76f51"],
}  # fmt: skip
plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "axes.ymargin": 0.12}
plt.rcParams |= {"legend.frameon": False, "font.size": 9, "savefig.dpi": 150}


class Cell(NamedTuple):
    task: str
    projector: str
    num_experts: int = 4
    top_k: int = 2
    llm: str = "small"
    balance: bool = True

    def parts(self):
        experts = [] if self.projector == "mlp" else [f"e{self.num_experts}", f"k{self.top_k}"]
        return [self.task, self.projector, *experts, *([] if self.balance else ["unbalanced"]), self.llm]

    def __str__(self):
        return " ".join([self.task.upper(), self.projector.upper(), *self.parts()[2:]])


class Claim(NamedTuple):
    paper: str
    cells: list
    pairs: list  # (a, b): is the WER of a lower than that of b?
    text: str = ""
    snrs: list = MAIN  # columns of the table
    over: list = MAIN  # the pairs are compared over these together


ASR_MLP, ASR_DEDR, MLP, DEDR = (Cell(task, p) for task in ("asr", "avsr") for p in ("mlp", "dedr"))
UNBALANCED = DEDR._replace(balance=False)
ENCODER = Cell("vsr", "dedr")  # with the first seed, it trains the video encoder of all AVSR cells on a corpus on disk
QUICK_CELLS = {ASR_DEDR, MLP, *(Cell("avsr", p) for p in ("jejr", "jedr", "dedr")), UNBALANCED}


def study(args):
    """{name: Claim} of --claims with its cells of --tasks; with --quick and no --claims, few cells of all."""
    avsr = {p: Cell("avsr", p) for p in ("mlp", "jejr", "jedr", "dedr")}
    task = next(task for task in ("avsr", "asr", "vsr") if task in args.tasks)  # of sizes and experts
    mlps, dedrs = ([Cell(task, p, llm=llm) for llm in args.llms] for p in ("mlp", "dedr"))
    mlp = Cell(task, "mlp")
    mixtures = [Cell(task, "dedr", e, k) for e in (2, 4, 8, 16) for k in (1, 2)]
    vsr = [Cell("vsr", "mlp"), ENCODER]
    claims = {
        "configurations": Claim(
            "of the projectors, DEDR gives the lowest WER, for ASR, VSR and AVSR.",
            [ASR_MLP, ASR_DEDR, *vsr, *avsr.values()],
            [(ASR_DEDR, ASR_MLP), tuple(vsr[::-1]), *((DEDR, avsr[p]) for p in ("mlp", "jejr", "jedr"))],
            "With one modality, JEJR, JEDR and DEDR are the same model. Without AV-HuBERT's weights, VSR trains its "
            "video encoder with the projector, and AVSR has that of --video-encoder or of VSR DEDR's first seed, frozen "
            "(on the synthetic corpus it trains its own; a perfect lip reader has 56 % there, as many words look the same).",
        ),
        "sizes": Claim(
            "with a mixture of projectors, smaller LLMs stay strong.",
            [cell for pair in zip(mlps, dedrs) for cell in pair],
            [*zip(dedrs, mlps), *zip(dedrs, mlps[1:])],
            "The tiny and the small LLM are trained from scratch, any other with LoRA and, on a corpus on disk, for 3 epochs.",
        ),
        "experts": Claim(
            "more experts add capacity at no cost of inference.",
            [mlp, *mixtures],
            [(cell, mlp) for cell in mixtures],
            "Decode time: greedy, encoders included, as a ratio to the MLP's, which decodes the same 8 clips in turns "
            "with it in one process, nine rounds; median [second lowest, second highest], which is the median's 95 % "
            "interval; models of the first seed.",
        ),
        "usage": Claim(
            "all experts are used, by each modality in its own way.",
            [DEDR, UNBALANCED, avsr["jedr"], avsr["jejr"]],
            [(DEDR, UNBALANCED)],
            "Tokens (%) that chose each expert, first seed, and the effective number of experts (exponential of the "
            "entropy of the choices) over all seeds. The strips show each token's expert of largest weight in the "
            "first test clip; audio and video have their own four.",
        ),
        "noise": Claim(
            "the mixture is robust to noise.",
            [ASR_MLP, ASR_DEDR, MLP, DEDR],
            [(DEDR, MLP), (ASR_DEDR, ASR_MLP), (MLP, ASR_MLP), (DEDR, ASR_DEDR)],
            "Compared over the five SNRs with noise together.",
            SNRS,
            NOISY,
        ),
    }
    kept = {}
    for name in args.claims:
        cells = [cell for cell in claims[name].cells if cell.task in args.tasks]
        cells = [cell for cell in cells if cell in QUICK_CELLS] if args.few else cells
        pairs = [pair for pair in claims[name].pairs if set(pair) <= set(cells)]
        if cells:
            kept[name] = claims[name]._replace(cells=cells, pairs=pairs)
    return kept


# --- from runs to numbers ----------------------------------------------------------------------------------------


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
    sizes = cached(folder / "sizes.json", lambda: count_parameters(folder, results))
    return Run(folder, results, dict(zip([(line["snr"], line["id"]) for line in lines], errors)), sizes)


def count_parameters(folder, results):
    with safe_open(folder / "model.safetensors", "pt") as file:
        numel = {name: math.prod(file.get_slice(name).get_shape()) for name in file.keys()}
    others = "running_mean", "running_var", "num_batches_tracked", "new_tokens.input", "new_tokens.output"

    def count(part):
        return sum(n for name, n in numel.items() if name.startswith(part) and not name.endswith(others))

    smop = f"projector.smops.{next(iter(results['routing']))}"  # joint experts bear the first modality's name
    active = count(f"{smop}.gate.") + results["top_k"] * count(f"{smop}.experts.0.")
    return {"trained": count(""), "projector": count("projector."), "active": active}


def difference(a, b, snrs):
    """WER of `a` minus that of `b` in points, over `snrs` and seeds together; its 95 % interval by a paired bootstrap
    over clips; in how many seeds it is lower. a, b: {seed: {(snr, clip): (errors, words)}}."""
    clips = {}  # {clip: [(seed, errors of a - errors of b, words)]}
    for seed in a.keys() & b.keys():
        for snr, clip in sorted(a[seed].keys() & b[seed].keys()):
            (errors_a, words), (errors_b, _) = a[seed][snr, clip], b[seed][snr, clip]
            if snr in snrs:
                clips.setdefault(clip, []).append((seed, errors_a - errors_b, words))
    if not clips:
        return {"verdict": "open"}

    def points(sample, seeds=a.keys() & b.keys()):
        rows = [row for clip in sample for row in clip if row[0] in seeds]
        return 100 * sum(more for _, more, _ in rows) / sum(words for _, _, words in rows)

    clips = list(clips.values())
    low, high = bootstrap(clips, points)
    lower = [points(clips, {seed}) < 0 for seed in a.keys() & b.keys()]
    verdict = "shown" if high < 0 else "opposite" if low > 0 else "not shown"
    verdict = verdict if len(lower) >= LEAST_SEEDS else "open"
    lower = f"{sum(lower)} of {len(lower)}"
    return {"points": round(points(clips), 2), "95": [low, high], "lower": lower, "verdict": verdict}


def compare(done, a, b, snrs):
    """`difference` of two cells with its text."""
    found = difference(*({seed: run.errors for seed, run in done.get(cell, {}).items()} for cell in (a, b)), snrs)
    text = f"{a} against {b}: "
    if "points" not in found:
        return found | {"text": text + "not trained yet"}
    interval = ", ".join(f"{x:+.1f}" for x in found["95"])
    return found | {"text": f"{text}{found['points']:+.1f} points of WER [{interval}], lower in {found['lower']} seeds"}


def wers(done, cell, snr):
    """The WER (%) of each seed."""
    return [run.results["wer"][snr] for run in done.get(cell, {}).values() if snr in run.results["wer"]]


def spread(values):
    """Mean ± standard deviation over the seeds."""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}" if values else "–"


def first_clips(args, count):
    clips, load = load_corpus(args.data, "test")
    dataset = ClipDataset(clips[:count], load, "avsr")
    return collate([dataset[i] for i in range(len(dataset))])


def decode_ratios(mlp, cell, args, rounds=9):
    """Time to decode 8 test clips as a ratio to the MLP's, of each round, sorted; both in turns in one process."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models, batch, ratios = [LlamaSMoP.load(folder).place(device) for folder in (mlp, cell)], first_clips(args, 8), []
    for _ in range(rounds + 2):
        at = [time.perf_counter()]
        for model in models:
            model.generate_ids(batch, max_new_tokens=16, min_new_tokens=16).cpu()  # equal lengths; waits for a GPU
            at.append(time.perf_counter())
        ratios.append((at[2] - at[1]) / (at[1] - at[0]))
    return sorted(ratios[2:])  # the first two warm up


@torch.no_grad()
def top_experts(folder, args):
    """{modality: the expert with the largest weight for each token of the first test clip}."""
    _, counts, routing = LlamaSMoP.load(folder).project(first_clips(args, 1))
    return {kind: routing[kind].experts[0, : counts[kind][0], 0].tolist() for kind in routing}


def words_of(clip, args):
    """[(start, end, word)] of a clip in seconds; of a corpus on disk, from --align."""
    if args.data == "synthetic":
        words, phones = synthetic._script(clip.id)
        spans, at = [], 0
        for silent, group in itertools.groupby(phones, lambda phone: phone[0] == "_"):
            frames = sum(frames for _, frames in group)
            spans += [] if silent else [(at / FPS, (at + frames) / FPS)]
            at += frames
        return [(*span, word) for span, word in zip(spans, words)]
    if args.align is None:
        return []
    rows = [line.split() for line in (args.align / f"{Path(clip.id).name}.align").read_text().splitlines()]
    return [(int(start) / 25_000, int(end) / 25_000, word) for start, end, word in rows if word not in ("sil", "sp")]


# --- pictures: each returns further columns {header: {cell: text}}, further verdicts, and its figures -------------


def figure(columns, width=3.2, height=2.8):
    fig, axes = plt.subplots(1, columns, figsize=(width * columns, height), squeeze=False, layout="constrained")
    return fig, axes[0]


def spreads(ax, x, values, **style):
    """Mean and standard deviation of each list of values that is not empty."""
    deviation = lambda v: statistics.stdev(v) if len(v) > 1 else math.nan  # noqa: E731
    points = [(at, statistics.mean(v), deviation(v)) for at, v in zip(x, values) if v]
    if points:
        ax.errorbar(*zip(*points), capsize=2, elinewidth=1, **style)


def bars(ax, groups, series, **labels):
    """Grouped bars: series [(name, [values of each group])]."""
    for i, (name, values) in enumerate(series):
        width = 0.8 / len(series)
        x = [at + (i - (len(series) - 1) / 2) * width for at in range(len(groups))]
        label = name.upper() if name in ("mlp", "jejr", "jedr", "dedr") else name
        ax.bar(x, [statistics.mean(v) if v else 0 for v in values], width, color=COLOURS[name], label=label)
        spreads(ax, x, values, color="0.2", fmt="none")
    ax.set(xticks=range(len(groups)), xticklabels=groups, **labels)


def same_height(axes):
    plt.setp(axes, ylim=(0, max(ax.get_ylim()[1] for ax in axes)))


def configurations(done, claim, args):
    tasks = [task for task in TASKS if any(cell.task == task for cell in claim.cells)]
    fig, axes = figure(len(tasks))
    for ax, task in zip(axes, tasks):
        snrs = MAIN if "audio" in TASKS[task] else MAIN[:1]
        series = [(c.projector, [wers(done, c, snr) for snr in snrs]) for c in claim.cells if c.task == task]
        bars(ax, snrs, series, title=task.upper(), xlabel="SNR (dB)", ylabel="WER (%)")
    same_height(axes)
    return {}, [], {"configurations": fig}


def sizes(done, claim, args):
    names = list(dict.fromkeys(cell.llm for cell in claim.cells))
    fig, axes = figure(len(MAIN))
    for ax, snr in zip(axes, MAIN):
        series = [(c.projector, [wers(done, c._replace(llm=llm), snr) for llm in names]) for c in claim.cells[:2]]
        bars(ax, names, series, title=snr if snr == "clean" else f"{snr} dB", xlabel="LLM", ylabel="WER (%)")
    same_height(axes)
    return {}, [], {"sizes": fig}


def experts(done, claim, args):
    (mlp, *mixtures), ratios = claim.cells, {}
    for cell in mixtures:
        if (a := done.get(mlp, {}).get(0)) and (b := done.get(cell, {}).get(0)):
            ratios[cell] = cached(b.folder / "decode.json", lambda: decode_ratios(a.folder, b.folder, args))
    texts = {c: f"{statistics.median(r):.2f} [{r[1]:.2f}, {r[-2]:.2f}]" for c, r in ratios.items()}
    verdicts = []
    for cell, r in ratios.items():
        verdict = "shown" if r[-2] <= 1.1 else "opposite" if r[1] > 1.1 else "not shown"
        text = f"{cell} decodes in at most 1.1 times the MLP's time: {texts[cell]}"
        verdicts.append({"text": text, "verdict": verdict})
    fig, axes = figure(4, width=2.6)
    counts = sorted({cell.num_experts for cell in claim.cells})
    panels = {
        "WER, clean (%)": lambda c: wers(done, c, "clean"),
        "WER at -5 dB (%)": lambda c: wers(done, c, "-5"),
        "projector (M parameters)": lambda c: [run.sizes["projector"] / 1e6 for run in done.get(c, {}).values()],
        "decode time / MLP's": lambda c: [1] if c == mlp else [statistics.median(ratios[c])] if c in ratios else [],
    }
    for ax, (label, values) in zip(axes, panels.items()):
        for k in (1, 2):
            of_k = [c for c in mixtures if c.top_k == k]
            style = {"color": COLOURS[f"top-{k}"], "marker": "o", "markersize": 9 - 2 * k, "label": f"top-{k}"}
            spreads(ax, [c.num_experts for c in of_k], [values(c) for c in of_k], **style)
        if values(mlp):
            ax.axhline(statistics.mean(values(mlp)), color=COLOURS["mlp"], label="MLP")
        ax.set(xscale="log", xlabel="experts per modality", ylabel=label, ylim=(0, 1.1 * ax.get_ylim()[1]))
        ax.set_xticks(counts, counts)
        ax.minorticks_off()
    return {"decode time": texts}, verdicts, {"experts": fig} if len(counts) > 1 else {}


def usage(done, claim, args):
    cells = [cell for cell in claim.cells if cell in done]
    columns, verdicts = {}, []
    fig, axes = figure(max(len(cells), 1), width=2.4)
    for ax, cell in zip(axes, cells):
        routings = [run.results["routing"] for run in done[cell].values()]
        shares = {kind: [[100 * u for u in routing[kind]["usage"]] for routing in routings] for kind in routings[0]}
        for kind, runs in shares.items():
            used = [[u / sum(run) for u in run if u] for run in runs]
            effective = spread([math.exp(-sum(u * math.log(u) for u in run)) for run in used])
            columns.setdefault(kind, {})[cell] = f"{', '.join(f'{u:.0f}' for u in runs[0])}: {effective}"
        title = cell.projector.upper() + ("" if cell.balance else ", no balancing")
        series = [(kind, [[u] for u in runs[0]]) for kind, runs in shares.items()]
        bars(ax, range(1, 1 + cell.num_experts), series, title=title, xlabel="expert", ylabel="tokens (%)")
        even = 100 * cell.top_k / cell.num_experts
        ax.axhline(even, color="0.4", linestyle=":", label="balanced")
        ax.set_ylim(0, 100)
        rarest = min(u for runs in shares.values() for run in runs for u in run)
        text = f"{cell}: in each modality and seed, each expert is chosen by {even / 4:g} % of the tokens (a quarter "
        text += f"of an even share) or more; the rarest by {rarest:.1f} %"
        verdicts.append({"text": text, "verdict": "shown" if rarest >= even / 4 else "not shown"})
    figures = {"usage": fig}
    if strips := [cell for cell in (DEDR, UNBALANCED) if 0 in done.get(cell, {})]:
        figures["clip"] = draw_clip(done, strips, args)
    return columns, verdicts, figures


def draw_clip(done, cells, args):
    """Each token's expert, over time, under the words of the first test clip."""
    clip = load_corpus(args.data, "test")[0][0]
    strips = {}
    for cell in cells:
        folder = done[cell][0].folder
        chosen = cached(folder / "clip.json", lambda: top_experts(folder, args))
        strips |= {kind + ("" if cell.balance else ", no balancing"): best for kind, best in chosen.items()}
    fig, (ax,) = figure(1, width=8, height=1.2 + 0.35 * len(strips))
    for row, best in enumerate(strips.values()):
        step = clip.frames / FPS / len(best)
        colours = [COLOURS["experts"][expert] for expert in best]
        ax.broken_barh([(i * step, step) for i in range(len(best))], (-row - 0.85, 0.7), facecolors=colours)
    for start, end, word in words_of(clip, args):
        ax.text((start + end) / 2, 0.35, word, ha="center", va="center")
        ax.vlines((start, end), -len(strips), 0.7, color="0.2", linewidth=0.6)
    for expert, colour in enumerate(COLOURS["experts"], start=1):
        ax.bar(0, 0, color=colour, label=f"expert {expert}")
    ax.set(xlim=(0, clip.frames / FPS), ylim=(-len(strips), 0.7), xlabel=f"time (s) in {clip.id}")
    ax.set_yticks([-row - 0.5 for row in range(len(strips))], strips)
    return fig


def noise(done, claim, args):
    x = [7.5 if snr == "clean" else float(snr) for snr in SNRS]
    fig, (ax,) = figure(1, width=5, height=3.4)
    for i, cell in enumerate(claim.cells):
        at = [snr + 0.1 * (i - (len(claim.cells) - 1) / 2) for snr in x]  # side by side: no error bar hides another
        style = {"color": COLOURS[cell.projector], "linestyle": "-" if cell.task == "avsr" else "--", "marker": "o"}
        label = f"{cell.task} {cell.projector}".upper()
        spreads(ax, at, [wers(done, cell, snr) for snr in SNRS], label=label, **style)
    ax.set(xlabel="SNR (dB)", ylabel="WER (%)", ylim=(0, None))
    ax.set_xticks(x, SNRS)
    ax.invert_xaxis()
    return {}, [], {"noise": fig}


PICTURES = {draw.__name__: draw for draw in (configurations, sizes, experts, usage, noise)}
CLAIMS = list(PICTURES)


# --- output ------------------------------------------------------------------------------------------------------

HEAD = """# {name}

Written by `study/reproduce.py`: {finished} of {all} runs, on {device}, code {code}. WER in percent on {clips} test clips, clean
and at an SNR in dB, {beams} beam(s): mean ± standard deviation over seeds. Parameters in millions: trained, of these in
the projector, of those active for a token. In names, e4 k2 is 4 experts, 2 of them a token. A difference of WER has the
95 % interval of a paired bootstrap over clips, all seeds together and, where nothing else is said, clean, 0 and −5 dB
together. The interval tells what other clips might give; the count of seeds, what another training might. Of such a
difference, **shown** means that the interval is below 0; **opposite**: above; **not shown**: it holds 0; **open**: fewer
than three seeds were trained. Verdicts on decode time and on use say themselves what they ask for.
"""


def write(done, runs, commands, args):
    """NAME.md, NAME.json and the pictures. done: {cell: {seed: Run}}; runs, commands: {(cell, seed): ...}."""
    args.out.mkdir(parents=True, exist_ok=True)
    finished = [run for seeds in done.values() for run in seeds.values()]
    missing = [folder.name for (cell, seed), folder in runs.items() if seed not in done.get(cell, {})]
    codes = {json.loads((run.folder / "cell.json").read_text())["code"] for run in finished}
    about = {"finished": len(finished), "all": len(runs), "code": " and ".join(sorted(codes)), "name": args.name}
    for name, key in (("device", "device"), ("clips", "clips"), ("beams", "num_beams")):
        about[name] = " and ".join(sorted({str(run.results[key]) for run in finished})) or "–"
    lines, claims, numbers = [HEAD.format(**about)], {}, {}
    if args.quick:
        lines.append(f"**Quick: {args.seeds} seed(s) at most; on a corpus on disk, 6 epochs in place of 8.**\n")
    if missing:
        lines.append(f"Not trained yet: {', '.join(missing)}.\n")
    for name, claim in study(args).items():
        columns, verdicts, figures = PICTURES[name](done, claim, args)
        table = [["", *claim.snrs, "seeds", "trained", "projector", "active", *columns]]
        for cell in claim.cells:
            of_cell = list(done.get(cell, {}).values())
            row = [str(cell), *(spread(wers(done, cell, snr)) for snr in claim.snrs), str(len(of_cell))]
            row += [f"{n / 1e6:.2f}" for n in of_cell[0].sizes.values()] if of_cell else ["–"] * 3
            table.append(row + [texts.get(cell, "–") for texts in columns.values()])
        verdicts = [compare(done, *pair, claim.over) for pair in claim.pairs] + verdicts
        claims[name] = {"paper": claim.paper, "table": table, "verdicts": verdicts}
        lines += [f"## {name.capitalize()}\n", f"The paper: {claim.paper}\n"]
        lines += [f"| {' | '.join(row)} |" for row in [table[0], ["---"] * len(table[0]), *table[1:]]]
        lines += ["", claim.text + "\n", *(f"![{title}]({args.name}-{title}.png)\n" for title in figures)]
        lines += [f"- {verdict['text']}: **{verdict['verdict']}**" for verdict in verdicts] + [""]
        for title, fig in figures.items():
            handles = {label: handle for ax in fig.axes[::-1] for handle, label in zip(*ax.get_legend_handles_labels())}
            fig.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=8)
            fig.savefig(args.out / f"{args.name}-{title}.png")
    lines += ["## Commands\n", "Of the first seed; the others have another `--seed`.\n", "```bash"]
    lines += [command for (_, seed), command in commands.items() if seed == 0] + ["```\n"]
    (args.out / f"{args.name}.md").write_text("\n".join(lines), encoding="utf-8")
    for (cell, seed), folder in runs.items():
        run = done.get(cell, {}).get(seed)
        found = run.sizes | run.results | {"data": args.data} if run else {}  # not a path of this machine
        numbers[folder.name] = {"command": commands[cell, seed]} | found
    about |= {"claims": claims, "runs": numbers}
    (args.out / f"{args.name}.json").write_text(json.dumps(about, indent=1) + "\n")
    print(f"wrote {args.out / args.name}.md, .json and pictures")
