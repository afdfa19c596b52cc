"""The paper's claims: what is compared for each, the numbers of the finished runs, and the verdicts.

`reproduce.py` trains the runs, `page.py` shows what is found here. A cell is a model of the study; with a seed it is a run
of train.py. `more_experts` and `expert_usage` give what a claim needs besides WERs: columns {header: {cell: text}} and
verdicts, a sentence each. `done` is {cell: {seed: Run}}.
"""

import json
import random
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch

from data import OTHERS, ClipDataset, collate, load_corpus
from eval import bootstrap, count_errors
from model import LlamaSMoP
from tools.run import write_atomically

SNRS, MAIN = "clean 5 2.5 0 -2.5 -5".split(), "clean 0 -5".split()
NOISY = SNRS[1:]
LEAST_SEEDS = 3  # for a verdict on a difference of WER: a seed may be luck
CLAIMS = ["configurations", "noise", "usage", "experts", "sizes", "data"]


class Cell(NamedTuple):
    task: str
    projector: str
    num_experts: int = 4
    top_k: int = 2
    llm: str = "small"
    balance: bool = True
    share: float = 1  # of the train clips

    def __str__(self):
        words = [self.task.upper(), self.projector.upper()]
        words += [] if self.projector == "mlp" else [f"e{self.num_experts}", f"k{self.top_k}"]
        words += [] if self.balance else ["unbalanced"]
        words += [] if self.share == 1 else [f"{self.share:g}"]
        return " ".join([*words, self.llm])


class Claim(NamedTuple):
    paper: str
    cells: list
    pairs: list  # (a, b): is the WER of a lower than that of b?
    snrs: list = MAIN  # columns of the table
    over: list = MAIN  # the pairs are compared over these together


def claims_of(args):
    """{name: Claim} of --claims."""
    llm = list(args.llms)[-1]  # of all claims but sizes
    asr_mlp, asr_dedr, vsr_mlp, vsr_dedr = (Cell(t, p, llm=llm) for t in ("asr", "vsr") for p in ("mlp", "dedr"))
    mlp, jejr, jedr, dedr = (Cell("avsr", p, llm=llm) for p in ("mlp", "jejr", "jedr", "dedr"))
    unbalanced = dedr._replace(balance=False)
    mixtures = [dedr._replace(num_experts=e, top_k=k) for e in (2, 4, 8, 16) for k in (1, 2)]
    dense = dedr._replace(num_experts=2)  # both experts for each token: DEDR's active parameters without a choice
    mlps, denses, dedrs = ([cell._replace(llm=llm) for llm in args.llms] for cell in (mlp, dense, dedr))
    shares = [(mlp._replace(share=share), dedr._replace(share=share)) for share in (0.25, 0.5, 1)]
    claims = {
        "configurations": Claim(
            "The paper: DEDR has the lowest WER, for ASR, VSR and AVSR. (With one modality, all three configurations are the same.)",
            [mlp, jejr, jedr, dedr, asr_mlp, asr_dedr, vsr_mlp, vsr_dedr],
            [(dedr, mlp), (dedr, jejr), (dedr, jedr), (asr_dedr, asr_mlp), (vsr_dedr, vsr_mlp)],
        ),
        "noise": Claim(
            "The paper: the mixture is robust to noise.",
            [asr_mlp, asr_dedr, vsr_dedr, mlp, dedr],
            [(dedr, mlp), (asr_dedr, asr_mlp), (mlp, asr_mlp), (dedr, asr_dedr)],
            SNRS,
            NOISY,
        ),
        "usage": Claim(
            "The paper: all experts are used.",
            [dedr, unbalanced, jedr, jejr],
            [(dedr, unbalanced)],
        ),
        "experts": Claim(
            "The paper: more experts add capacity at no cost of inference.",
            [mlp, *mixtures],
            [(cell, mlp) for cell in mixtures],
        ),
        "sizes": Claim(
            "The paper: with a mixture of projectors, smaller LLMs stay strong.",
            [cell for cells in zip(mlps, denses, dedrs) for cell in cells],
            [*zip(dedrs, mlps), *zip(dedrs, denses), *zip(dedrs, mlps[1:])],
        ),
        "data": Claim(
            "Not in the paper: how much training data do more experts need?",
            [cell for cells in shares for cell in cells],
            [(dedr, mlp) for mlp, dedr in shares],
        ),
    }
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
        text = json.dumps(measure()) + "\n"
        write_atomically(file, lambda path: path.write_text(text))
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
    seeds, sums = sorted(a.keys() & b.keys()), defaultdict(lambda: [0, 0])
    for seed in seeds:
        for snr, clip in sorted(a[seed]):
            if snr in snrs:
                (errors, words), (errors_b, _) = a[seed][snr, clip], b[seed][snr, clip]
                sums[clip, seed][0] += errors - errors_b
                sums[clip, seed][1] += words

    def points(clips, seeds):
        more, words = (sum(sums[clip, seed][i] for clip in clips for seed in seeds) for i in (0, 1))
        return 100 * more / words

    clips, rng = list(dict.fromkeys(clip for clip, _ in sums)), random.Random(0)
    low, high = bootstrap(clips, lambda sample: points(sample, rng.choices(seeds, k=len(seeds))))
    lower = sum(points(clips, [seed]) < 0 for seed in seeds)
    verdict = "open" if len(seeds) < LEAST_SEEDS else "shown" if high < 0 else "opposite" if low > 0 else "not shown"
    found = {"points": round(points(clips, seeds), 2), "95": [low, high], "lower": f"{lower} of {len(seeds)}"}
    return found | {"verdict": verdict}


def compare(done, a, b, snrs):
    """The sentence on a pair of cells: its difference and verdict on the test clips and, if there are any, on others."""
    parts = []
    for split, where in {"test": "", OTHERS: "on other talkers "}.items():
        if done[a][0].errors[split]:
            d = difference(*({seed: run.errors[split] for seed, run in done[cell].items()} for cell in (a, b)), snrs)
            interval = "[{:+.1f}, {:+.1f}]".format(*d["95"])
            parts.append(
                f"{where}{d['points']:+.1f} points of WER {interval}, lower in {d['lower']} seeds: **{d['verdict']}**"
            )
    return f"{a} against {b}: {'; '.join(parts)}"


def wers(done, cell, snr, split="test"):
    """The WER (%) of each seed."""
    return [run.wers[split][snr] for run in done[cell].values() if snr in run.wers[split]]


def spread(values):
    """Mean ± standard deviation over the seeds."""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}" if values else "–"


def decode_ratios(mlp_folder, folder, data, rounds=9):
    """Time to decode 8 test clips as a ratio to the MLP's, of each round, sorted; both in turns in one process."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models, ratios = [LlamaSMoP.load(folder).to(device) for folder in (mlp_folder, folder)], []
    clips, load = load_corpus(data, "test")
    dataset = ClipDataset(clips[:8], load, models[0].modalities)
    batch = collate([dataset[i] for i in range(len(dataset))])
    for _ in range(rounds + 2):
        at = [time.perf_counter()]
        for model in models:
            model.generate_ids(batch, max_new_tokens=16, min_new_tokens=16).cpu()  # equal lengths; waits for a GPU
            at.append(time.perf_counter())
        ratios.append((at[2] - at[1]) / (at[1] - at[0]))
    return sorted(ratios[2:])  # the first two warm up


# --- claims with more than WERs ----------------------------------------------------------------------------------


def rarest(done, cell):
    """The share (%) of a modality's tokens that the rarest expert gets, for each seed."""
    routings = [run.results["routing"].values() for run in done[cell].values()]
    return [100 * min(share for routing in seed for share in routing["usage"]) for seed in routings]


def more_experts(done, claim, args):
    times, shares, verdicts = {}, {}, []
    mlp, *mixtures = claim.cells
    for cell in mixtures:
        folders = [done[c][0].folder for c in (mlp, cell)]
        r = cached(folders[1] / "decode.json", lambda: decode_ratios(*folders, args.data))
        times[cell] = f"{statistics.median(r):.2f} [{r[1]:.2f}, {r[-2]:.2f}]"
        shares[cell] = ", ".join(f"{share:.1f}" for share in rarest(done, cell))
        verdict = "shown" if r[-2] <= 1.1 else "opposite" if r[1] > 1.1 else "not shown"
        verdicts.append(f"{cell} decodes in at most 1.1 times the MLP's time: {times[cell]}: **{verdict}**")
    return {"decode time": times, "tokens (%) of the rarest expert, by seed": shares}, verdicts


def expert_usage(done, claim, args):
    columns, verdicts = {}, []
    for cell in claim.cells:
        for name, routing in done[cell][0].results["routing"].items():
            usage = ", ".join(f"{100 * share:.0f}" for share in routing["usage"])
            columns.setdefault(f"{name}: tokens (%) by expert, seed 0", {})[cell] = usage
        shares, least = rarest(done, cell), 100 * cell.top_k / cell.num_experts / 4
        text = f"{cell}: in each modality and seed, each expert gets {least:g} % of the tokens (a quarter of an even share) "
        text += f"or more; the rarest, by seed, {', '.join(f'{share:.1f}' for share in shares)} %"
        verdicts.append(f"{text}: **{'shown' if min(shares) >= least else 'not shown'}**")
    return columns, verdicts
