"""The paper's claims on your corpus: each with its runs, its table, its picture and its verdict.

    python -m study.reproduce --data synthetic --quick --seeds 1    # six runs, 12 minutes on two cores
    python -m study.reproduce --data grid-mouths --audio-encoder whisper-base-encoder --noise babble.wav \\
        --llm HuggingFaceTB/SmolLM2-135M-Instruct --jobs 8
    python -m study.reproduce --data grid-mouths ... --claims experts --tasks asr    # in ASR, not in AVSR
    python -m study.reproduce --data DIR ... -- --epochs 20 --num-beams 15           # after --: for every train.py

Trains every cell (a model of the study) with every seed as an ordinary run of train.py in RUNS/NAME/CELL-sSEED, its
output in train.log. The same command goes on where it was stopped. A run that was trained with other arguments or other
code (its cell.json says which) is refused, or trained anew with --overwrite. claims.py then writes NAME.md, NAME.json
and the pictures to --out. Nothing is chosen by its test clips.
"""

import argparse
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from data import load_corpus
from model import MODALITIES
from study.claims import CLAIMS, ENCODER, SNRS, claims_of, write
from tools.errors import InputError, run_command
from train import SMALL_LLM, parse_args

HERE = Path(__file__).resolve().parent.parent
SOURCES = "smop model data avhubert whisper_encoder tools/media tools/run train synthetic".split()
TINY_LLM = SMALL_LLM | {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "initializer_range": 0.12}
SCRATCH = {"tiny": json.dumps(TINY_LLM), "small": None}  # --llm of train.py (None: its default), small ones first
# What train.py is told on a corpus on disk; on the synthetic one it has its defaults. The video encoder is trained by the
# VSR runs. It is as wide as Whisper-base, which joint experts need.
VIDEO = {"dim": 512, "layers": 2, "heads": 8, "ffn_dim": 1024, "stem_width": 12, "stem_stride": 4}
VIDEO |= {"trunk_widths": [12, 24, 48, 96], "conv_pos": 32, "dropout": 0.1}
VSR = {"epochs": 36, "clean_epochs": 12, "max_frames": 900, "lr": 4e-4, "video_encoder": json.dumps(VIDEO)}
HEARING = {"epochs": 6, "clean_epochs": 3, "max_frames": 600, "lr": 4.5e-4}
PRETRAINED_LLM = {"epochs": 3, "clean_epochs": 1, "max_frames": 300, "lr": 1e-3}  # in place of these


def folder_of(cell, seed, args):
    return args.runs / args.name / f"{'-'.join(cell.words())}-s{seed}"


def encoder_of(cell, args):
    """The run whose video encoder an AVSR cell takes, or None."""
    own = cell.task != "avsr" or args.data == "synthetic" or args.video_encoder
    return None if own else folder_of(ENCODER, 0, args)


def all_runs(args):
    """{(cell, seed): folder} in the order of training: all cells with the first seed, then with the next."""
    cells = list(dict.fromkeys(cell for claim in claims_of(args).values() for cell in claim.cells))
    runs = [(ENCODER, 0)] if any(encoder_of(cell, args) for cell in cells) else []
    runs += [(cell, seed) for seed in range(args.seeds) for cell in cells]
    return {run: folder_of(*run, args) for run in runs}


def arguments(cell, seed, args):
    """The command line of train.py, but for --out."""
    given = {"data": args.data, "task": cell.task, "projector": cell.projector, "seed": seed}
    given |= {"llm": args.llms[cell.llm], "eval_snr": " ".join(SNRS)}
    if args.data != "synthetic":
        given |= VSR if cell.task == "vsr" else HEARING
        given |= {} if cell.llm in SCRATCH else PRETRAINED_LLM
    if cell.projector != "mlp":
        given |= {"num_experts": cell.num_experts, "top_k": cell.top_k}
    if not cell.balance:
        given["load_balancing_weight"] = 0.0
    if "audio" in MODALITIES[cell.task]:
        given |= {"noise": args.noise, "audio_encoder": args.audio_encoder}
        given["audio_window"] = "clip" if args.audio_encoder else None
    if "video" in MODALITIES[cell.task] and (encoder := args.video_encoder or encoder_of(cell, args)):
        given["video_encoder"] = encoder
    pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in given.items() if value is not None]
    return [word for pair in pairs for word in pair] + args.extra


def identity(cell, seed, args):
    """What a run must have been trained with. Of paths only the name counts: folders may move."""
    code = hashlib.sha256(b"".join((HERE / f"{name}.py").read_bytes() for name in SOURCES)).hexdigest()[:12]
    return {"code": code, "arguments": [Path(word).name for word in arguments(cell, seed, args)]}


def check(runs, args):
    """Refuse runs that were trained with something else than the study asks for; --overwrite deletes them."""
    for run, folder in runs.items():
        file = folder / "cell.json"
        found, asked = json.loads(file.read_text()) if file.is_file() else {}, identity(*run, args)
        if folder.exists() and found != asked:
            if not args.overwrite:
                names = " and ".join(name for name in asked if found.get(name) != asked[name])
                raise InputError(f"{folder}: trained with other {names} than asked for; --overwrite trains anew")
            shutil.rmtree(folder)


def finished(folder):
    return folder is None or (folder / "results.json").is_file()


def train(runs, args):
    """Train what is not finished, `--jobs` runs side by side."""
    waiting = [run for run, folder in runs.items() if not finished(folder)]
    print(f"{len(runs) - len(waiting)} runs are finished, {len(waiting)} to train", flush=True)
    running = {}
    try:
        while waiting or running:
            for run in [run for run, process in running.items() if process.poll() is not None]:
                if running.pop(run).returncode != 0:
                    raise InputError(f"train.py failed; see {runs[run] / 'train.log'}")
                wer = json.loads((runs[run] / "results.json").read_text())["wer"]
                print(f"{len(waiting) + len(running):3} left; {runs[run].name}: WER {wer}", flush=True)
            ready = [run for run in waiting if finished(encoder_of(run[0], args))]
            for run in ready[: args.jobs - len(running)]:
                waiting.remove(run)
                running[run] = start(run, runs[run], args)
            time.sleep(0.2)
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
    finally:  # train.py writes a checkpoint when it is stopped
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()


def start(run, folder, args):
    """The process of train.py, which goes on by itself if it was interrupted."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cell.json").write_text(json.dumps(identity(*run, args), indent=2) + "\n")
    threads = str(max((os.cpu_count() or 1) // args.jobs, 1))
    env = os.environ | {"OMP_NUM_THREADS": threads, "TQDM_MININTERVAL": "10"}
    command = [sys.executable, HERE / "train.py", *arguments(*run, args), "--out", folder]
    with open(folder / "train.log", "a") as log:  # a new session: Ctrl-C reaches it once, as terminate()
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True)


def read_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, help='"synthetic" or a folder with the manifests of prepare.py')
    add("--quick", action="store_true", help="six cells, no sizes of the LLM")
    add("--claims", nargs="+", choices=CLAIMS, default=list(CLAIMS), help="which to check (default: all)")
    add("--tasks", nargs="+", choices=MODALITIES, default=list(MODALITIES), help="only cells of these (default: all)")
    add("--seeds", type=int, default=3, help="runs of each cell; a verdict needs 3 (default: 3)")
    add("--audio-encoder", help="frozen Whisper, as wide as the video encoder (default on disk: openai/whisper-base)")
    add("--video-encoder", help="AV-HuBERT file, frozen (default: the encoder of a VSR run of the study)")
    add("--llm", help="hub name or folder of a Llama for LoRA: a third size beside two from scratch")
    add("--noise", help="audio file of noise (default: babble of the train split)")
    add("--jobs", type=int, default=2, help="runs side by side (default: 2)")
    add("--overwrite", action="store_true", help="train runs anew that were trained with other arguments or code")
    add("--runs", type=Path, default=Path("runs/study"), help="folder of the runs (default: runs/study)")
    add("--out", type=Path, default=HERE / "study" / "results", help="folder of the tables (default: study/results)")
    add("--name", help="of the tables and of the folder in --runs (default: that of the data, with --quick -quick)")
    add("extra", nargs="*", help="after --: arguments for every train.py")
    args = parser.parse_args()
    if args.seeds < 1 or args.jobs < 1:
        raise InputError(f"--seeds and --jobs must be at least 1, got {args.seeds} and {args.jobs}")
    args.llms = SCRATCH | ({Path(args.llm).name: args.llm} if args.llm else {})
    if args.data != "synthetic" and args.audio_encoder is None:
        args.audio_encoder = "openai/whisper-base"
    args.name = args.name or Path(args.data).resolve().name + ("-quick" if args.quick else "")
    return args


def main():
    args = read_arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: `train` stops its runs
    load_corpus(args.data, "test")  # a wrong --data ends here, not in a train.log
    runs = all_runs(args)
    if not runs:
        raise InputError(f"no model of {', '.join(args.claims)} is of the tasks {', '.join(args.tasks)}")
    commands = {run: arguments(*run, args) for run in runs}
    for command in commands.values():
        parse_args(command)  # a wrong argument, too
    check(runs, args)
    train(runs, args)
    lines = {run: shlex.join(["python", "train.py", *commands[run], "--out", str(runs[run])]) for run in runs}
    write(runs, lines, args)


if __name__ == "__main__":
    run_command(main)
