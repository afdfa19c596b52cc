"""The paper's claims on a corpus of yours: each with its runs, its table, its picture and its verdict.

    python -m study.reproduce --data synthetic --quick              # six runs, 12 minutes on two cores
    python -m study.reproduce --data grid-mouths --audio-encoder whisper-base-encoder --noise babble.wav \\
        --align grid/align --llm HuggingFaceTB/SmolLM2-135M-Instruct --jobs 8
    python -m study.reproduce --data grid-mouths ... --claims experts --tasks asr    # in ASR, not in AVSR: no video encoder
    python -m study.reproduce --data grid-mouths ... --minutes 9    # as far as it gets; the same command goes on from there
    python -m study.reproduce --data DIR ... -- --epochs 20 --num-beams 15        # after --: arguments for every train.py

Trains every cell of the study with every seed as an ordinary run of train.py in RUNS/NAME/CELL-sSEED, its output in
train.log. A finished run is kept, an interrupted one continues; one trained with other arguments or other code (its
cell.json says which) is refused, or trained anew with --retrain. claims.py then writes NAME.md, NAME.json and the
pictures to --out. No run and no cell is chosen by its test clips.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from study.claims import CLAIMS, ENCODER, SNRS, read_run, study, write
from data import TASKS, load_corpus
from train import SMALL_LLM, parse_args

HERE = Path(__file__).resolve().parent.parent
SOURCES = "smop.py model.py data.py avhubert.py train.py synthetic.py".split()  # what decides the weights of a run
PATHS = "data noise llm audio_encoder video_encoder".split()  # arguments that may be a path
TINY_LLM = SMALL_LLM | {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "initializer_range": 0.12}
SCRATCH = {"tiny": json.dumps(TINY_LLM), "small": None}  # --llm of train.py (None: its default), small ones first
# What train.py is told for all cells of a task, beside what makes the cell, on a corpus on disk (the synthetic one has
# its defaults). The video encoder is trained by the VSR runs; it is as wide as Whisper-base, which joint experts need.
VIDEO = {"dim": 512, "layers": 2, "heads": 8, "ffn_dim": 1024, "stem_width": 12, "stem_stride": 4}
VIDEO |= {"trunk_widths": [12, 24, 48, 96], "conv_pos": 32, "dropout": 0.1}
VSR = {"epochs": 36, "clean_epochs": 12, "max_frames": 900, "lr": 4e-4, "video_encoder": json.dumps(VIDEO)}
HEARING = {"epochs": 8, "clean_epochs": 3, "max_frames": 600, "lr": 4.5e-4}
PRETRAINED_LLM = {"epochs": 3, "clean_epochs": 1, "max_frames": 300, "lr": 1e-3}  # in place of these


# --- runs --------------------------------------------------------------------------------------------------------


def needs_encoder(cell, args):
    return cell.task == "avsr" and args.data != "synthetic" and args.video_encoder is None


def all_runs(args):
    """{(cell, seed): folder}, in the order of training: all cells with the first seed, then with the next."""
    cells = list(dict.fromkeys(cell for claim in study(args).values() for cell in claim.cells))
    first = [(ENCODER, 0)] if any(needs_encoder(cell, args) for cell in cells) else []
    runs = dict.fromkeys([*first, *((cell, seed) for seed in range(args.seeds) for cell in cells)])
    return {run: args.runs / args.name / "-".join([*run[0].parts(), f"s{run[1]}"]) for run in runs}


def arguments(cell, seed, args):
    """The command line of train.py, but for --out and --workers."""
    given = {"data": args.data, "task": cell.task, "projector": cell.projector, "seed": seed}
    given |= {"llm": args.llms[cell.llm], "eval_snr": " ".join(SNRS)}
    if args.data != "synthetic":
        given |= VSR if cell.task == "vsr" else HEARING | ({"epochs": 6} if args.quick else {})
        given |= PRETRAINED_LLM if cell.llm not in SCRATCH else {}
    if cell.projector != "mlp":
        given |= {"num_experts": cell.num_experts, "top_k": cell.top_k}
    if not cell.balance:
        given["load_balancing_weight"] = 0.0
    if "audio" in TASKS[cell.task]:
        given |= {"noise": args.noise, "audio_encoder": args.audio_encoder}
        given["audio_window"] = "clip" if args.audio_encoder else None
    if "video" in TASKS[cell.task] and args.video_encoder:
        given["video_encoder"] = args.video_encoder
    elif needs_encoder(cell, args):
        given["video_encoder"] = args.runs / args.name / "-".join([*ENCODER.parts(), "s0"])
    pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in given.items() if value is not None]
    return [word for pair in pairs for word in pair] + args.extra


def identity(cell, seed, args):
    """What a run must have been trained with: arguments, code, and the same of the run with its video encoder."""
    values = dataclasses.asdict(parse_args(arguments(cell, seed, args))[0])
    values = {name: value for name, value in values.items() if name not in ("out", "device", "workers")}
    values |= {name: Path(values[name]).name for name in PATHS if values[name] is not None}  # folders may move
    values["code"] = hashlib.sha256(b"".join((HERE / name).read_bytes() for name in SOURCES)).hexdigest()[:12]
    return values | ({"encoder": identity(ENCODER, 0, args)} if needs_encoder(cell, args) else {})


# --- training ----------------------------------------------------------------------------------------------------


def check(runs, args):
    """Refuse runs that were trained with something else than the study asks for; --retrain deletes them."""
    changed = {}
    for run, folder in runs.items():
        if folder.exists():
            file, wanted = folder / "cell.json", identity(*run, args)
            found = json.loads(file.read_text()) if file.is_file() else {}
            names = [name for name in wanted | found if wanted.get(name) != found.get(name)]
            if names:
                changed[folder] = ", ".join(names) if found else "no cell.json"
    if changed and not args.retrain:
        listed = "; ".join(f"{folder} ({names})" for folder, names in changed.items())
        raise ValueError(f"trained with something else than asked for, --retrain deletes and trains anew: {listed}")
    for folder in changed:
        shutil.rmtree(folder)


def train(runs, args):
    """Train what is not finished, `--jobs` runs side by side; after `--minutes`, stop those that are not done."""
    finished = lambda run: (runs[run] / "results.json").is_file()  # noqa: E731
    waiting = [run for run in runs if not finished(run)]
    print(f"{len(runs) - len(waiting)} runs are finished, {len(waiting)} to train", flush=True)
    deadline = time.time() + 60 * args.minutes
    threads = max((os.cpu_count() or 1) // args.jobs, 1)
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "TQDM_MININTERVAL": "10"}
    running = {}
    try:
        while (waiting or running) and time.time() < deadline:
            for run in [run for run, process in running.items() if process.poll() is not None]:
                if running.pop(run).returncode != 0:
                    raise ValueError(f"train.py failed; see {runs[run] / 'train.log'}")
                wer = json.loads((runs[run] / "results.json").read_text())["wer"]
                print(f"{len(waiting) + len(running):3} left; {runs[run].name}: WER {wer}", flush=True)
            ready = [run for run in waiting if not needs_encoder(run[0], args) or finished((ENCODER, 0))]
            for run in ready[: args.jobs - len(running)]:
                waiting.remove(run)
                runs[run].mkdir(parents=True, exist_ok=True)
                (runs[run] / "cell.json").write_text(json.dumps(identity(*run, args), indent=2) + "\n")
                command = ["--out", str(runs[run]), "--workers", str(min(threads, 4)), *arguments(*run, args)]
                if (runs[run] / "checkpoint.pt").is_file():
                    command = ["--resume", str(runs[run])]
                with open(runs[run] / "train.log", "a") as log:
                    command = [sys.executable, str(HERE / "train.py"), *command]
                    running[run] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)
            time.sleep(0.2)
    finally:  # what is stopped goes on from where it is the next time
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()


def main():
    argv, extra = sys.argv[1:], []
    if "--" in argv:
        argv, extra = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--data", required=True, help='"synthetic" or a folder with the manifests of prepare.py')
    add("--quick", action="store_true", help="one seed, few cells, no sizes; on disk, 6 epochs in place of 8")
    add("--claims", nargs="+", choices=CLAIMS, help="these with all cells, also with --quick (default: all)")
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="only cells of these (default: all)")
    add("--seeds", type=int, help="runs of each cell (default: 3, with --quick 1)")
    add("--audio-encoder", help="frozen Whisper, as wide as the video encoder (default on disk: openai/whisper-base)")
    add("--video-encoder", help="AV-HuBERT file, frozen (default: the encoder of a VSR run of the study)")
    add("--llm", help="hub name or folder of a Llama for LoRA: a third size beside two from scratch")
    add("--noise", help="audio file of noise (default: babble of the train split)")
    add("--align", type=Path, help="folder of GRID's .align files: words for the picture of a clip")
    add("--jobs", type=int, default=2, help="runs side by side (default: 2)")
    add("--minutes", type=float, default=math.inf, help="then stop training, and write what there is")
    add("--retrain", action="store_true", help="delete runs trained with other arguments or code")
    add("--runs", type=Path, default=Path("runs/study"), help="folder of the runs (default: runs/study)")
    add("--out", type=Path, default=HERE / "study" / "results", help="folder of the tables (default: study/results)")
    add("--name", help="of the tables and of the folder in --runs (default: that of the data, with --quick -quick)")
    args = parser.parse_args(argv, argparse.Namespace(extra=extra))
    args.few = args.quick and not args.claims
    args.claims = args.claims or [name for name in CLAIMS if name != "sizes" or not args.few]
    args.seeds = (1 if args.quick else 3) if args.seeds is None else args.seeds
    if args.seeds < 1 or args.jobs < 1:
        parser.error(f"--seeds and --jobs must be at least 1, got {args.seeds} and {args.jobs}")
    args.llms = SCRATCH | ({Path(args.llm).name: args.llm} if args.llm else {})
    if args.data != "synthetic" and args.audio_encoder is None:
        args.audio_encoder = "openai/whisper-base"
    args.name = args.name or Path(args.data).resolve().name + ("-quick" if args.quick else "")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; the same command goes on"))  # and stops its runs

    load_corpus(args.data, "test")  # a wrong --data ends here, not in a train.log
    runs = all_runs(args)
    if not runs:
        raise ValueError(f"no model of {', '.join(args.claims)} is of the tasks {', '.join(args.tasks)}")
    check(runs, args)
    train(runs, args)
    done = {}
    for (cell, seed), folder in runs.items():
        if (folder / "results.json").is_file():
            done.setdefault(cell, {})[seed] = read_run(folder)
    line = lambda run: shlex.join(["python", "train.py", *arguments(*run, args), "--out", str(runs[run])])  # noqa: E731
    write(done, runs, {run: line(run) for run in runs}, args)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:  # a fault of the input: its sentence, without our call stack
        sys.exit(f"error: {error}")
