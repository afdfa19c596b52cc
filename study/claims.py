"""The paper's claims: what is compared for each, the numbers of the finished runs, and the verdicts.

`reproduce.py` trains the runs, `page.py` shows what is found here. A cell is a model of the study; with a seed it is a run
of train.py. `experts` and `usage` find what a claim needs beside WERs: columns {header: {cell: text}} and verdicts. `done`
is {cell: {seed: Run}}.
"""

import json
import random
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch

from data import OTHERS, ClipDataset, collate, load_corpus
from encoders import MODALITIES
from eval import bootstrap, count_errors
from model import LlamaSMoP

SNRS, NOISY, MAIN = "clean 5 2.5 0 -2.5 -5".split(), "5 2.5 0 -2.5 -5".split(), "clean 0 -5".split()
LEAST_SEEDS = 3  # for a verdict on a difference of WER: a seed may be luck


class Cell(NamedTuple):
    task: str
    projector: str
    num_experts: int = 4
    top_k: int = 2
    llm: str = "small"
    balance: bool = True
    share: float = 1  # of the train clips

    def words(self):
        experts = [] if self.projector == "mlp" else [f"e{self.num_experts}", f"k{self.top_k}"]
        changes = [*([] if self.balance else ["unbalanced"]), *([] if self.share == 1 else [f"{self.share:g}"])]
        return [self.task, self.projector, *experts, *changes, self.llm]

    def __str__(self):
        return " ".join([self.task.upper(), self.projector.upper(), *self.words()[2:]])


class Claim(NamedTuple):
    paper: str
    cells: list
    pairs: list  # (a, b): is the WER of a lower than that of b?
    snrs: list = MAIN  # columns of the table
    over: list = MAIN  # the pairs are compared over these together


ASR_MLP, ASR_DEDR, VSR_MLP, VSR_DEDR = (Cell(task, p) for task in ("asr", "vsr") for p in ("mlp", "dedr"))
MLP, JEJR, JEDR, DEDR = (Cell("avsr", p) for p in ("mlp", "jejr", "jedr", "dedr"))
UNBALANCED = DEDR._replace(balance=False)
MIXTURES = [DEDR._replace(num_experts=e, top_k=k) for e in (2, 4, 8, 16) for k in (1, 2)]
CLAIMS = ["configurations", "noise", "usage", "experts", "sizes", "data"]


def claims_of(args):
    """{name: Claim} of --claims."""
    dense = DEDR._replace(num_experts=2)  # both experts for each token: DEDR's active parameters without a choice
    mlps, denses, dedrs = ([cell._replace(llm=llm) for llm in args.llms] for cell in (MLP, dense, DEDR))
    shares = [cell._replace(share=share) for share in (0.25, 0.5, 1) for cell in (MLP, DEDR)]
    claims = {
        "configurations": Claim(
            "The paper: DEDR has the lowest WER, for ASR, VSR and AVSR. (With one modality all configurations are one.)",
            [MLP, JEJR, JEDR, DEDR, ASR_MLP, ASR_DEDR, VSR_MLP, VSR_DEDR],
            [(DEDR, MLP), (DEDR, JEJR), (DEDR, JEDR), (ASR_DEDR, ASR_MLP), (VSR_DEDR, VSR_MLP)],
        ),
        "noise": Claim(
            "The paper: the mixture is robust to noise.",
            [ASR_MLP, ASR_DEDR, VSR_DEDR, MLP, DEDR],
            [(DEDR, MLP), (ASR_DEDR, ASR_MLP), (MLP, ASR_MLP), (DEDR, ASR_DEDR)],
            SNRS,
            NOISY,
        ),
        "usage": Claim(
            "The paper: all experts are used, by each modality in its own way.",
            [DEDR, UNBALANCED, JEDR, JEJR],
            [(DEDR, UNBALANCED)],
        ),
        "experts": Claim(
            "The paper: more experts add capacity at no cost of inference.",
            [MLP, *MIXTURES],
            [(cell, MLP) for cell in MIXTURES],
        ),
        "sizes": Claim(
            "The paper: with a mixture of projectors, smaller LLMs stay strong.",
            [cell for cells in zip(mlps, denses, dedrs) for cell in cells],
            [*zip(dedrs, mlps), *zip(dedrs, denses), *zip(dedrs, mlps[1:])],
        ),
        "data": Claim(
            "Not in the paper: how much training data do more experts need?",
            shares,
            [pair[::-1] for pair in zip(shares[::2], shares[1::2])],
        ),
    }
    llm = list(args.llms)[-1]
    for name, claim in claims.items():
        if name != "sizes":
            cells, *pairs = ([cell._replace(llm=llm) for cell in cells] for cells in (claim.cells, *claim.pairs))
            claims[name] = claim._replace(cells=cells, pairs=pairs)
    return {name: claims[name] for name in args.claims}


# --- numbers -----------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    folder: Path
    results: dict  # of eval.py
    wers: dict  # {split: {snr: WER}} of test and, if the corpus has them, others
    errors: dict  # {split: {(snr, clip): (word errors, reference words)}}
    sizes: dict  # parameters: trained, of these in the projector, of those active for a token


def cached(file, measure):
    """What `measure` gives, kept in the run's folder, so that tables can be made without the weights."""
    if not file.is_file():
        file.write_text(json.dumps(measure()) + "\n")
    return json.loads(file.read_text())


def read_run(folder):
    wers, errors = {"test": {}, OTHERS: {}}, {"test": {}, OTHERS: {}}
    for split, place in {"test": folder, OTHERS: folder / OTHERS}.items():
        if (place / "results.json").is_file():
            wers[split] = json.loads((place / "results.json").read_text())["wer"]
            lines = [json.loads(line) for line in open(place / "hypotheses.jsonl", encoding="utf-8")]
            counts = count_errors([line["reference"] for line in lines], [line["hypothesis"] for line in lines])
            errors[split] = dict(zip([(line["snr"], line["id"]) for line in lines], counts))
    sizes = cached(folder / "sizes.json", lambda: count_parameters(LlamaSMoP.load(folder)))
    return Run(folder, json.loads((folder / "results.json").read_text()), wers, errors, sizes)


def count_parameters(model):
    def count(*modules):
        return sum(p.numel() for module in modules for p in module.parameters() if p.requires_grad)

    gate, experts = (next(iter(parts.values())) for parts in (model.projector.gates, model.projector.experts))
    active = count(gate, *experts[: model.projector.top_k])
    return {"trained": count(model), "projector": count(model.projector), "active": active}


def difference(a, b, snrs):
    """WER of `a` minus that of `b` in points, over `snrs` and seeds together; its 95 % interval by a paired bootstrap
    over clips and seeds; in how many seeds it is lower. a, b: {seed: {(snr, clip): (errors, words)}}."""
    seeds, clips = sorted(a.keys() & b.keys()), {}  # {clip: {seed: [errors of a - errors of b, words]}}
    for seed in seeds:
        for snr, clip in sorted(a[seed].keys() & b[seed].keys()):
            if snr in snrs:
                (errors_a, words), (errors_b, _) = a[seed][snr, clip], b[seed][snr, clip]
                sums = clips.setdefault(clip, {}).setdefault(seed, [0, 0])
                sums[:] = sums[0] + errors_a - errors_b, sums[1] + words

    def points(sample, seeds):
        more, words = (sum(clip[seed][i] for clip in sample for seed in seeds) for i in (0, 1))
        return 100 * more / words

    clips, rng = list(clips.values()), random.Random(0)
    low, high = bootstrap(clips, lambda sample: points(sample, rng.choices(seeds, k=len(seeds))))
    lower = sum(points(clips, [seed]) < 0 for seed in seeds)
    verdict = "open" if len(seeds) < LEAST_SEEDS else "shown" if high < 0 else "opposite" if low > 0 else "not shown"
    found = {"points": round(points(clips, seeds), 2), "95": [low, high], "lower": f"{lower} of {len(seeds)}"}
    return found | {"verdict": verdict}


def compare(done, a, b, snrs):
    def on(split):
        return difference(*({seed: run.errors[split] for seed, run in done[cell].items()} for cell in (a, b)), snrs)

    def words(found):
        low, high = found["95"]
        return f"{found['points']:+.1f} points of WER [{low:+.1f}, {high:+.1f}], lower in {found['lower']} seeds"

    found = on("test")
    found["text"] = f"{a} against {b}: {words(found)}"
    if done[a][0].errors[OTHERS]:
        others = found[OTHERS] = on(OTHERS)
        others["text"] = f"; on other talkers {words(others)}: **{others['verdict']}**"
    return found


def wers(done, cell, snr, split="test"):
    """The WER (%) of each seed."""
    return [run.wers[split][snr] for run in done[cell].values() if snr in run.wers[split]]


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


# --- claims with more than WERs ----------------------------------------------------------------------------------


def experts(done, claim, args):
    texts, verdicts = {}, []
    mlp, *mixtures = claim.cells
    for cell in mixtures:
        folders = [done[c][0].folder for c in (mlp, cell)]
        r = cached(folders[1] / "decode.json", lambda: decode_ratios(*folders, args.data))
        texts[cell] = f"{statistics.median(r):.2f} [{r[1]:.2f}, {r[-2]:.2f}]"
        text = f"{cell} decodes in at most 1.1 times the MLP's time: {texts[cell]}"
        verdict = "shown" if r[-2] <= 1.1 else "opposite" if r[1] > 1.1 else "not shown"
        verdicts.append({"text": text, "verdict": verdict})
    return {"decode time": texts}, verdicts


def usage(done, claim, args):
    columns, verdicts = {}, []
    for cell in claim.cells:
        routings, even = [run.results["routing"] for run in done[cell].values()], 100 * cell.top_k / cell.num_experts
        shares = {name: [[100 * u for u in routing[name]["usage"]] for routing in routings] for name in routings[0]}
        for name, runs in shares.items():
            columns.setdefault(f"{name}: tokens (%) by expert", {})[cell] = ", ".join(f"{u:.0f}" for u in runs[0])
        rarest = min(u for runs in shares.values() for run in runs for u in run)
        text = f"{cell}: in each modality and seed, each expert is chosen by {even / 4:g} % of the tokens (a quarter "
        text += f"of an even share) or more; the rarest by {rarest:.1f} %"
        verdicts.append({"text": text, "verdict": "shown" if rarest >= even / 4 else "not shown"})
    return columns, verdicts
