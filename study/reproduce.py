"""The paper's claims on your corpus: each with its runs, its table, its picture and its verdict.

    python -m study.reproduce --data grid-features        # of tools/encode.py
    python -m study.reproduce --data lrs2-features --llm meta-llama/Llama-3.2-1B -- --num-beams 15

Trains every cell (a model of the study) with every seed as an ordinary run of train.py in RUNS/NAME/CELL-sSEED, its
output in train.log. Repeat an interrupted command to continue it; a run of other arguments is refused. page.py then
writes NAME.md, NAME.json and the pictures to --out; NAME is that of the data. No setting was chosen on test clips.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from data import OTHERS, load_corpus
from study.claims import CLAIMS, SNRS, claims_of
from study.page import write
from tools.errors import InputError, run_command
from tools.features import FACTS, is_features
from tools.run import write_atomically
from train import SMALL_LLM, flag, parse_args

ROOT = Path(__file__).resolve().parent.parent
TINY_LLM = SMALL_LLM | {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "initializer_range": 0.12}
SCRATCH = {"tiny": json.dumps(TINY_LLM), "small": None}  # --llm of train.py (None: its default), small ones first
# From scratch; chosen on the valid split of GRID.
RECIPE = {"epochs": 12, "clean_epochs": 2, "max_frames": 900, "lr": 1e-3}


def runs_of(args):
    """{(cell, seed): folder} in the order of training: all cells with the first seed, then with the next."""
    cells = dict.fromkeys(cell for claim in claims_of(args).values() for cell in claim.cells)
    names = {cell: str(cell).lower().replace(" ", "-") for cell in cells}
    folder = args.runs / args.name
    return {(cell, seed): folder / f"{name}-s{seed}" for seed in range(args.seeds) for cell, name in names.items()}


def share_folder(share, args):
    return args.data if share == 1 else args.runs / args.name / f"share-{share:g}"


def make_share(share, args):
    """A folder of the features with only a share of the train clips, evenly taken."""
    data, folder = Path(args.data), share_folder(share, args)
    folder.mkdir(parents=True, exist_ok=True)
    for file in data.iterdir():
        if file.name != "train.csv" and not (folder / file.name).is_symlink():
            (folder / file.name).symlink_to(file.resolve())
    header, *rows = (data / "train.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [row for i, row in enumerate(rows) if int((i + 1) * share) > int(i * share)]
    write_atomically(folder / "train.csv", lambda path: path.write_text("".join([header, *kept]), encoding="utf-8"))


def arguments(cell, seed, args):
    """The command line of train.py, but for --out. All shares of the clips take the same number of steps."""
    given = {"data": share_folder(cell.share, args), "task": cell.task, "projector": cell.projector, "seed": seed}
    given |= {"llm": args.llms[cell.llm]} | (RECIPE if cell.llm in SCRATCH else {})  # else train.py's defaults
    if cell.projector != "mlp":
        given |= {"num_experts": cell.num_experts, "top_k": cell.top_k}
    if not cell.balance:
        given["load_balancing_weight"] = 0.0
    command = flags(given | {"eval_snr": " ".join(SNRS), "workers": 0}) + args.extra
    if cell.share == 1:
        return command
    whole = parse_args(command)[0]
    return command + flags({name: round(getattr(whole, name) / cell.share) for name in ("epochs", "clean_epochs")})


def flags(given):
    return [word for name, x in given.items() if x is not None for word in (f"--{flag(name)}", str(x))]


def check(run, folder, args):
    """Raise an InputError if a run is there that was trained with other arguments."""
    if (folder / "args.json").is_file():
        found = json.loads((folder / "args.json").read_text())
        asked = dataclasses.asdict(parse_args(arguments(*run, args))[0])
        for name in ("out", "device", "workers"):  # change no result that counts
            del asked[name]
        if other := [flag(name) for name in asked if found.get(name) != asked[name]]:
            raise InputError(f"{folder}: trained with another --{', --'.join(other)}; delete it or give another --runs")


def next_command(run, folder, args):
    """What is left to do of a run: train it, then evaluate it on the other talkers; None if it is finished."""
    if not (folder / "results.json").is_file():
        return [ROOT / "train.py", *arguments(*run, args), "--out", folder]
    if (Path(args.data) / f"{OTHERS}.csv").is_file() and not (folder / OTHERS / "results.json").is_file():
        snrs = ["clean"] if run[0].task == "vsr" else SNRS
        trained = json.loads((folder / "args.json").read_text())
        same = flags({"num_beams": trained["num_beams"], "device": trained["device"], "out": folder / OTHERS})
        return [ROOT / "eval.py", folder, "--split", OTHERS, "--snr", *snrs, *same]


def finish(run, folder, args):
    """Do what is left of a run. train.py continues an interrupted one."""
    folder.mkdir(parents=True, exist_ok=True)
    threads = str(max((os.cpu_count() or 1) // args.jobs, 1))
    env = os.environ | {"OMP_NUM_THREADS": threads, "TQDM_MININTERVAL": "10"}
    while command := next_command(run, folder, args):
        with open(folder / "train.log", "a") as log:
            done = subprocess.run([sys.executable, *command], stdout=log, stderr=subprocess.STDOUT, env=env)
        if done.returncode != 0:
            raise InputError(f"a run failed; see {folder / 'train.log'}")
    return f"{folder.name}: WER {json.loads((folder / 'results.json').read_text())['wer']}"


def train(runs, args):
    """Finish all runs, `--jobs` side by side. Ctrl-C reaches those that run, too; train.py then writes a checkpoint."""
    left = {run: folder for run, folder in runs.items() if next_command(run, folder, args)}
    print(f"{len(runs) - len(left)} runs are finished, {len(left)} to train", flush=True)
    pool = ThreadPoolExecutor(args.jobs)
    try:
        jobs = [pool.submit(finish, run, folder, args) for run, folder in left.items()]
        for number, job in enumerate(as_completed(jobs), start=1):
            print(f"{len(jobs) - number:3} left; {job.result()}", flush=True)
    except KeyboardInterrupt:
        sys.exit("stopped; repeat the command to continue")
    finally:
        pool.shutdown(cancel_futures=True)  # waits for those that run


def read_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, help="folder of tools/encode.py")
    add("--claims", nargs="+", choices=CLAIMS, default=CLAIMS, help="which to check (default: all)")
    add("--seeds", type=int, default=5, help="runs of each cell; a verdict on WERs needs 3 (default: 5)")
    add("--llm", help="hub name or folder of a Llama for LoRA (default: a small one from scratch)")
    add("--jobs", type=int, default=2, help="runs side by side (default: 2)")
    add("--runs", type=Path, default=Path("runs/study"), help="folder of the runs (default: runs/study)")
    add("--out", type=Path, default=ROOT / "study" / "results", help="folder of the tables (default: study/results)")
    add("extra", nargs="*", help="after --: arguments for every train.py")
    args = parser.parse_args()
    args.llms = SCRATCH | ({Path(args.llm).name: args.llm} if args.llm else {})  # the last one is that of all claims
    args.name = Path(args.data).resolve().name
    return args


def main():
    args = read_arguments()
    if not is_features(args.data):
        raise InputError(f"{args.data}: no {FACTS}; expected a folder of python -m tools.encode")
    load_corpus(args.data, "test")  # a wrong folder ends here, not in a train.log
    runs = runs_of(args)
    for share in {cell.share for cell, _ in runs} - {1}:
        make_share(share, args)
    for run, folder in runs.items():
        check(run, folder, args)
    train(runs, args)
    write(runs, args)


if __name__ == "__main__":
    run_command(main)
