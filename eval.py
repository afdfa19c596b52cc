"""Word error rate of a run, clean and in noise, and what its routers do.

    python eval.py RUN                                       # the test split as the run was trained, clean
    python eval.py RUN --snr clean 5 2.5 0 -2.5 -5 --num-beams 15
    python eval.py RUN --data OTHER_DIR --split valid --noise babble.wav --snr 0
    torchrun --standalone --nproc_per_node 4 eval.py RUN     # several GPUs: the same results

Needs the run folder, and what it names: the corpus and the pretrained parts. Writes into it, in place of the training's
own, or into --out: `results.json`, `times.json`, `hypotheses.jsonl` (snr, id, reference, hypothesis) and, where matplotlib
is installed, `routing.png` and `wer.png`. Noise is drawn from each clip's id, so all but the times repeats exactly.
"""

import argparse
import json
import math
import os
import platform
import random
import sys
import time
from pathlib import Path

import jiwer
import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm

from data import ClipDataset, FrameBatches, load_audio, load_corpus, make_babble, make_loader
from model import LlamaSMoP


def parse_snr(text):
    """ "clean" -> None, "0" -> 0.0 dB."""
    try:
        snr = None if text == "clean" else float(text)
    except ValueError:
        snr = math.nan
    if snr is not None and not abs(snr) <= 100:
        raise ValueError(f"an SNR is clean or a number of dB between -100 and 100, got {text!r}")
    return snr


def fault(error):
    """What to print of an error of the input: its sentence, without our call stack, also where a worker met it."""
    text = str(error)
    if text.startswith("Caught "):  # in a worker of the loader, with its call stack
        text = text.splitlines()[-1].removeprefix(f"{type(error).__name__}: ")
    return f"error: {text}"


def name_snr(snr):
    return "clean" if snr is None else f"{snr:g}"


def load_noise(path, data):
    """The noise of a file, or babble made of the train split of `data` where there is none."""
    return load_audio(path) if path else make_babble(*load_corpus(data, "train"))


def join_processes(device):
    """(rank, number of processes, device) of this process of torchrun, or of the only one."""
    local, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if device.partition(":")[0] not in ("cpu", "cuda") or device.startswith("cuda") and gpus < local:
        raise ValueError(f"--device must be cpu, or cuda with {local} GPUs (here: {gpus}), got {device}")
    rank, world, device = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), torch.device(device)
    if world > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return rank, world, device


def own_batches(clips, max_frames):
    """This process's batches of clips of similar length: all of them, or every n-th of n processes."""
    batches = FrameBatches([clip.frames for clip in clips], max_frames, shuffle=False).batches()
    return batches[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else batches


def gather(values):
    """The lists of all processes as one list, in each of them."""
    if not dist.is_initialized():
        return values
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, values)
    return [value for values in lists for value in values]


def evaluate(model, clips, load, noise=None, snrs=(None,), num_beams=1, max_frames=2000, workers=0):
    """(results, hypotheses): the WER at each SNR with its interval, the routing on the first one, and every text.

    Under torchrun the processes share the clips, and each one returns the whole.
    """
    device = next(model.parameters()).device
    task = model.config["task"]
    wer, interval, hypotheses, routings = {}, {}, [], []
    hook = model.projector.register_forward_hook(lambda module, inputs, out: routings.append(real_tokens(out[1])))
    start = time.time()
    for snr in snrs:
        dataset = ClipDataset(clips, load, task, noise=noise, snr=snr)
        loader = make_loader(dataset, own_batches(clips, max_frames), workers)
        texts = []
        others = dist.is_initialized() and dist.get_rank() > 0
        for batch in tqdm(loader, desc=f"decode {name_snr(snr)}", unit="batch", leave=False, disable=others):
            texts += zip(batch["ids"], model.generate(batch, num_beams))
        hook.remove()  # after the first SNR
        texts = dict(gather(texts))
        pairs = [(clip.text, texts[clip.id]) for clip in clips]
        wer[name_snr(snr)], interval[name_snr(snr)] = word_error_rate(*zip(*pairs))
        hypotheses += [
            {"snr": name_snr(snr), "id": clip.id, "reference": clip.text, "hypothesis": texts[clip.id]}
            for clip in clips
        ]
    results = {
        "task": task,
        "projector": model.config["projector"],
        "num_experts": model.config["num_experts"],
        "top_k": model.config["top_k"],
        "wer": wer,
        "wer_95": interval,
        "clips": len(clips),
        "num_beams": num_beams,
        "routing": routing_statistics(gather(routings)),
        "seconds": round(time.time() - start, 1),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    return results, hypotheses


def count_errors(references, hypotheses):
    """[(word errors, reference words)] of each clip; upper and lower case are the same, as in the published scoring."""
    clips = []
    for reference, hypothesis in zip(references, hypotheses):
        words = jiwer.process_words(reference.lower(), hypothesis.lower())
        errors = words.substitutions + words.deletions + words.insertions
        clips.append((errors, words.hits + words.substitutions + words.deletions))
    return clips


def bootstrap(clips, statistic, resamples=1000):
    """95 % interval of statistic(clips), over resamples of the clips."""
    rng = random.Random(0)
    values = sorted(statistic(rng.choices(clips, k=len(clips))) for _ in range(resamples))
    return [round(values[int(q * resamples)], 2) for q in (0.025, 0.975)]


def word_error_rate(references, hypotheses):
    """Corpus WER in percent (all errors over all reference words) and its 95 % bootstrap interval over clips."""
    clips = count_errors(references, hypotheses)

    def rate(sample):
        return 100 * sum(errors for errors, _ in sample) / sum(length for _, length in sample)

    return round(rate(clips), 2), bootstrap(clips, rate)


def real_tokens(routing):
    """{modality: (experts (tokens, k), logits (tokens, E))} on the CPU, without the padding."""
    real = {kind: r.weights[..., 0] > 0 for kind, r in routing.items()}
    return {kind: (r.experts[real[kind]].cpu(), r.logits[real[kind]].cpu()) for kind, r in routing.items()}


def routing_statistics(routings):
    """{modality: {"usage": share of tokens that chose each expert, "entropy": of the router, in nats}}."""
    statistics = {}
    for kind in routings[0]:
        experts, logits = (torch.cat(parts) for parts in zip(*[r[kind] for r in routings]))
        usage = experts.flatten().bincount(minlength=logits.shape[-1]) / len(experts)
        entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
        statistics[kind] = {"usage": [round(u, 4) for u in usage.tolist()], "entropy": round(entropy.item(), 4)}
    return statistics


def draw(results, folder):
    """routing.png and wer.png. Without matplotlib, says so and draws nothing."""
    try:
        import matplotlib
    except ImportError:
        print("no pictures: pip install matplotlib")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, len(results["routing"]), figsize=(4 * len(results["routing"]), 3), squeeze=False)
    for ax, (kind, statistics) in zip(axes[0], results["routing"].items()):
        usage = [100 * share for share in statistics["usage"]]
        ax.bar(range(1, len(usage) + 1), usage, color={"audio": "C0", "video": "C1"}[kind])
        ax.axhline(100 * results["top_k"] / len(usage), color="0.5", linestyle=":", label="balanced")
        ax.set(title=f"{kind} tokens", xlabel="expert", ylabel="chosen by (%)", xticks=range(1, len(usage) + 1))
        ax.legend(frameon=False)
    fig.savefig(folder / "routing.png", dpi=150, bbox_inches="tight")

    noisy = sorted((float(snr), wer, results["wer_95"][snr]) for snr, wer in results["wer"].items() if snr != "clean")
    if noisy:
        snrs, wers, intervals = zip(*noisy)
        low, high = zip(*[(wer - a, b - wer) for wer, (a, b) in zip(wers, intervals)])
        fig, ax = plt.subplots(figsize=(4, 3))
        ax.errorbar(snrs, wers, [low, high], marker="o", capsize=3, label="in babble")
        if "clean" in results["wer"]:
            ax.axhline(results["wer"]["clean"], color="0.5", linestyle=":", label="clean")
        ax.set(xlabel="SNR (dB)", ylabel="WER (%)", ylim=(0, None), title=results["task"].upper())
        ax.legend(frameon=False)
        fig.savefig(folder / "wer.png", dpi=150, bbox_inches="tight")
    plt.close("all")


def report(results, hypotheses, folder):
    """Print the WERs and ten hypotheses, and write the run folder's files."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    times = {name: results[name] for name in ("seconds", "training_minutes") if name in results}
    results = {name: value for name, value in results.items() if name not in times}  # what repeats exactly
    (folder / "times.json").write_text(json.dumps(times) + "\n")
    with open(folder / "hypotheses.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in hypotheses)
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")  # last: with it, a run is finished
    for line in hypotheses[:10]:
        print(f"  {line['id']}: {line['reference']}\n  {' ' * len(line['id'])}> {line['hypothesis']}")
    print(f"{'SNR (dB)':>9} {'WER (%)':>8}  95 % interval")
    for snr, wer in results["wer"].items():
        print(f"{snr:>9} {wer:8.2f}  {results['wer_95'][snr]}")
    for kind, statistics in results["routing"].items():
        print(f"{kind}: experts chosen by {statistics['usage']} of the tokens, entropy {statistics['entropy']}")
    draw(results, folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder written by train.py or LlamaSMoP.save")
    parser.add_argument("--data", help='"synthetic" or a folder of manifests (default: that of the training)')
    parser.add_argument("--split", default="test", help="name of the manifest (default: test)")
    parser.add_argument("--snr", nargs="+", default=["clean"], help="dB or clean (default: clean)")
    parser.add_argument("--noise", help="audio file (default: that of the training, or babble of its train split)")
    parser.add_argument("--num-beams", type=int, default=1, help="1 is greedy (published: 15)")
    parser.add_argument("--max-frames", type=int, help="video frames per batch (default: that of the training)")
    parser.add_argument("--out", type=Path, help="folder for the results (default: the run folder)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    args = parser.parse_args()

    if not (args.run / "config.json").is_file():
        raise ValueError(f"{args.run}: no config.json; expected a folder of LlamaSMoP.save, or of a finished train.py")
    # of a model that train.py did not train
    trained = {"data": None, "noise": None, "seed": None, "workers": 2, "max_frames": 2000}
    if (args.run / "args.json").is_file():
        trained = json.loads((args.run / "args.json").read_text())
    snrs = [parse_snr(snr) for snr in args.snr]
    max_frames = trained["max_frames"] if args.max_frames is None else args.max_frames
    if not 1 <= args.num_beams <= 100 or max_frames < 1:
        raise ValueError(
            f"--num-beams must be between 1 and 100 and --max-frames positive, got {args.num_beams}, {max_frames}"
        )
    data = args.data or trained["data"]
    if data is None:
        raise ValueError(f"{args.run}: not trained by train.py, so --data must say what to evaluate on")
    clips, load = load_corpus(data, args.split)
    noise = None
    if any(snr is not None for snr in snrs):
        noise = load_noise(args.noise or trained["noise"], trained["data"] or data)
    rank, _, device = join_processes(args.device)
    model = LlamaSMoP.load(args.run).place(device)
    if "audio" not in model.kinds and snrs != [None]:
        raise ValueError(f"{args.run}: a model without audio has no SNR")
    model.check(clips)
    results, hypotheses = evaluate(model, clips, load, noise, snrs, args.num_beams, max_frames, trained["workers"])
    if rank == 0:
        report({"data": data, "split": args.split, "seed": trained["seed"]} | results, hypotheses, args.out or args.run)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(fault(error))
