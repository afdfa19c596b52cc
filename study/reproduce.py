"""The paper's claims on your corpus: each with its runs, its table, its picture and its verdict.

    python -m study.reproduce --data grid-features        # of tools/encode.py
    python -m study.reproduce --data lrs2-features --llm meta-llama/Llama-3.2-1B -- --num-beams 15

Trains every cell (a model of the study) with every seed as an ordinary run of train.py in RUNS/NAME/CELL-sSEED, its
output in train.log. Repeat an interrupted command to continue it; a run of other arguments is refused. page.py then
writes NAME.md, NAME.json and the pictures to --out; NAME is that of the data. Nothing is chosen by its test clips,
and every finished seed counts.
"""

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from glob import escape, glob
from pathlib import Path

from data import OTHERS, load_corpus
from encoders import MODALITIES
from study.claims import CLAIMS, SNRS, claims_of
from study.page import write
from tools.errors import InputError, run_command
from tools.features import FACTS, is_features
from tools.run import write_atomically
from train import SMALL_LLM, flag, parse_args

HERE = Path(__file__).resolve().parent.parent
TINY_LLM = SMALL_LLM | {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "initializer_range": 0.12}
SCRATCH = {"tiny": json.dumps(TINY_LLM), "small": None}  # --llm of train.py (None: its default), small ones first
# Chosen on the valid split, see study/README.md.
FROM_SCRATCH = {"epochs": 12, "clean_epochs": 2, "max_frames": 900, "lr": 1e-3}
PRETRAINED = {"epochs": 10, "clean_epochs": 0}  # as published; so are train.py's other defaults


def cells_of(args):
    """[(cell, folder of its runs but for the seed)]"""
    cells = dict.fromkeys(cell for claim in claims_of(args).values() for cell in claim.cells)
    return [(cell, f"{args.runs / args.name / '-'.join(cell.words())}-s") for cell in cells]


def all_runs(args):
    """{(cell, seed): folder} in the order of training: all cells with the first seed, then with the next."""
    return {(cell, seed): Path(f"{start}{seed}") for seed in range(args.seeds) for cell, start in cells_of(args)}


def finished_runs(args):
    """{(cell, seed): folder} of all finished runs of these cells, also of seeds that this call did not train."""
    found = {}
    for cell, start in cells_of(args):
        for file in glob(f"{escape(start)}*/results.json"):
            folder = Path(file).parent
            found[cell, int(str(folder).removeprefix(start))] = folder
    return dict(sorted(found.items()))


def arguments(cell, seed, args):
    """The command line of train.py, but for --out."""
    given = {"data": share_of(cell.share, args), "task": cell.task, "projector": cell.projector, "seed": seed}
    given |= {"llm": args.llms[cell.llm]} | (FROM_SCRATCH if cell.llm in SCRATCH else PRETRAINED)
    given |= {name: round(given[name] / cell.share) for name in ("epochs", "clean_epochs")}  # the same number of steps
    if cell.projector != "mlp":
        given |= {"num_experts": cell.num_experts, "top_k": cell.top_k}
    if not cell.balance:
        given["load_balancing_weight"] = 0.0
    given |= {"eval_snr": " ".join(SNRS), "workers": 0}
    return flags(given) + args.extra


def flags(given):
    return [word for name, x in given.items() if x is not None for word in (f"--{flag(name)}", str(x))]


def share_of(share, args):
    """The features, or a folder of them with only a share of the train clips."""
    if share == 1:
        return args.data
    folder = args.runs / args.name / f"share-{share:g}"
    folder.mkdir(parents=True, exist_ok=True)
    for file in Path(args.data).iterdir():
        if file.name != "train.csv" and not (folder / file.name).is_symlink():
            (folder / file.name).symlink_to(file.resolve())
    header, *rows = (Path(args.data) / "train.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [row for i, row in enumerate(rows) if int((i + 1) * share) > int(i * share)]  # evenly
    write_atomically(folder / "train.csv", lambda path: path.write_text("".join([header, *kept]), encoding="utf-8"))
    return folder


def check(run, folder, args):
    """An InputError if a run is there that was trained with other arguments."""
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
        return [HERE / "train.py", *arguments(*run, args), "--out", folder]
    if (Path(args.data) / f"{OTHERS}.csv").is_file() and not (folder / OTHERS / "results.json").is_file():
        snrs = SNRS if "audio" in MODALITIES[run[0].task] else ["clean"]
        trained = json.loads((folder / "args.json").read_text())
        same = flags({"num_beams": trained["num_beams"], "device": trained["device"], "out": folder / OTHERS})
        return [HERE / "eval.py", folder, "--split", OTHERS, "--snr", *snrs, *same]


def train(runs, args):
    """Do what is left, `--jobs` runs side by side."""
    waiting = [run for run, folder in runs.items() if next_command(run, folder, args)]
    print(f"{len(runs) - len(waiting)} runs are finished, {len(waiting)} to train", flush=True)
    running = {}
    try:
        while waiting or running:
            for run in [run for run, process in running.items() if process.poll() is not None]:
                if running.pop(run).returncode != 0:
                    raise InputError(f"a run failed; see {runs[run] / 'train.log'}")
                if next_command(run, runs[run], args):
                    waiting.insert(0, run)
                else:
                    wer = json.loads((runs[run] / "results.json").read_text())["wer"]
                    print(f"{len(waiting) + len(running):3} left; {runs[run].name}: WER {wer}", flush=True)
            for run in waiting[: args.jobs - len(running)]:
                waiting.remove(run)
                running[run] = start(run, runs[run], args)
            time.sleep(0.2)
    except KeyboardInterrupt:
        sys.exit("stopped; repeat the command to continue")
    finally:  # train.py writes a checkpoint when it is stopped
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()


def start(run, folder, args):
    """The process of a run's next command. train.py continues an interrupted one."""
    command = [sys.executable, *next_command(run, folder, args)]
    folder.mkdir(parents=True, exist_ok=True)
    threads = str(max((os.cpu_count() or 1) // args.jobs, 1))
    env = os.environ | {"OMP_NUM_THREADS": threads, "TQDM_MININTERVAL": "10"}
    with open(folder / "train.log", "a") as log:  # a new session: Ctrl-C reaches it once, as terminate()
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True)


def read_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, help="folder of tools/encode.py")
    add("--claims", nargs="+", choices=CLAIMS, default=list(CLAIMS), help="which to check (default: all)")
    add("--seeds", type=int, default=5, help="runs of each cell; a verdict needs 3 (default: 5)")
    add("--llm", help="hub name or folder of a Llama for LoRA (default: a small one from scratch)")
    add("--jobs", type=int, default=2, help="runs side by side (default: 2)")
    add("--runs", type=Path, default=Path("runs/study"), help="folder of the runs (default: runs/study)")
    add("--out", type=Path, default=HERE / "study" / "results", help="folder of the tables (default: study/results)")
    add("extra", nargs="*", help="after --: arguments for every train.py")
    args = parser.parse_args()
    args.llms = SCRATCH | ({Path(args.llm).name: args.llm} if args.llm else {})  # the last one is that of all claims
    args.name = Path(args.data).resolve().name
    return args


def main():
    args = read_arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: `train` stops its runs
    if not is_features(args.data):
        raise InputError(f"{args.data}: no {FACTS}; expected a folder of python -m tools.encode")
    load_corpus(args.data, "test")  # a wrong folder ends here, not in a train.log
    runs = all_runs(args)
    for run, folder in (runs | finished_runs(args)).items():
        check(run, folder, args)
    train(runs, args)
    write(finished_runs(args), args)


if __name__ == "__main__":
    run_command(main)
