"""Word error rate of a run, clean and in noise, and what its routers do.

    python eval.py RUN                                       # the test split as the run was trained, clean
    python eval.py RUN --snr clean 5 2.5 0 -2.5 -5 --num-beams 15
    python eval.py RUN --data OTHER_DIR --split valid --noise babble.wav --snr 0

Needs the run folder, and what it names: the corpus and the frozen encoders. Writes into it (or --out) `results.json`, `hypotheses.jsonl` (snr, id, reference, hypothesis) and, where
matplotlib is installed, `routing.png` and `wer.png`. Noise is drawn from each clip's id, so a WER repeats exactly.
"""

import argparse
import json
import platform
import random
import sys
import time
from pathlib import Path

import jiwer
import torch
import transformers
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import ClipDataset, FrameBatches, collate, load_audio, load_corpus, make_babble
from model import LlamaSMoP


def parse_snr(text):
    """"clean" -> None, "0" -> 0.0 dB."""
    return None if text == "clean" else float(text)


def name_snr(snr):
    return "clean" if snr is None else f"{snr:g}"


def load_noise(path, clips, load):
    """The noise of a file, or babble made of `clips` (those of the train split) where there is none."""
    return load_audio(path) if path else make_babble(clips, load)


def evaluate(model, clips, load, noise=None, snrs=(None,), num_beams=1, max_frames=2000, workers=0):
    """(results, hypotheses): the WER at each SNR with its interval, the routing on the first one, and every text."""
    device = next(model.parameters()).device
    task = model.config["task"]
    wer, interval, hypotheses, usage = {}, {}, [], None
    start = time.time()
    for snr in snrs:
        dataset = ClipDataset(clips, load, task, noise=noise, snr=snr)
        batches = FrameBatches([clip.frames for clip in clips], max_frames, shuffle=False)
        loader = DataLoader(dataset, batch_sampler=batches, collate_fn=collate, num_workers=workers)
        texts, routings = {}, []
        for batch in tqdm(loader, desc=f"decode {name_snr(snr)}", unit="batch", leave=False):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                texts |= zip(batch["ids"], model.generate(batch, num_beams))
                if usage is None:
                    with torch.no_grad():
                        routings.append(model.project(batch)[2])
        usage = usage or routing_statistics(routings)
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
        "routing": usage,
        "seconds": round(time.time() - start, 1),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    return results, hypotheses


def word_error_rate(references, hypotheses, resamples=1000):
    """Corpus WER in percent (all errors over all reference words) and its 95 % bootstrap interval over clips."""
    clips = []
    for reference, hypothesis in zip(references, hypotheses):
        words = jiwer.process_words(reference, hypothesis)
        errors = words.substitutions + words.deletions + words.insertions
        clips.append((errors, words.hits + words.substitutions + words.deletions))

    def rate(sample):
        return 100 * sum(errors for errors, _ in sample) / sum(length for _, length in sample)

    rng = random.Random(0)
    rates = sorted(rate(rng.choices(clips, k=len(clips))) for _ in range(resamples))
    return round(rate(clips), 2), [round(rates[int(q * resamples)], 2) for q in (0.025, 0.975)]


def routing_statistics(routings):
    """{modality: {"usage": share of tokens that chose each expert, "entropy": of the router, in nats}}."""
    statistics = {}
    for kind in routings[0]:
        real = [r[kind].weights[..., 0] > 0 for r in routings]
        experts = torch.cat([r[kind].experts[mask] for r, mask in zip(routings, real)])  # (tokens, k)
        logits = torch.cat([r[kind].logits[mask] for r, mask in zip(routings, real)])  # (tokens, E)
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
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    with open(folder / "hypotheses.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in hypotheses)
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
    parser.add_argument("run", type=Path, help="folder written by train.py")
    parser.add_argument("--data", help='"synthetic" or a folder of manifests (default: that of the training)')
    parser.add_argument("--split", default="test", help="name of the manifest (default: test)")
    parser.add_argument("--snr", nargs="+", type=parse_snr, default=[None], help="dB or clean (default: clean)")
    parser.add_argument("--noise", help="audio file (default: that of the training, or babble of its train split)")
    parser.add_argument("--num-beams", type=int, default=1, help="1 is greedy (published: 15)")
    parser.add_argument("--out", type=Path, help="folder for the results (default: the run folder)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    if not (args.run / "args.json").is_file():
        sys.exit(f"{args.run}: no args.json; expected a folder written by train.py")
    trained = json.loads((args.run / "args.json").read_text())
    if trained["task"] == "vsr" and args.snr != [None]:
        sys.exit(f"{args.run}: a run without audio has no SNR")
    data = args.data or trained["data"]
    clips, load = load_corpus(data, args.split)
    noise = None
    if any(snr is not None for snr in args.snr):
        noise = load_noise(args.noise or trained["noise"], *load_corpus(trained["data"], "train"))
    model = LlamaSMoP.load(args.run).to(args.device)
    results, hypotheses = evaluate(model, clips, load, noise, args.snr, args.num_beams, workers=trained["workers"])
    report({"data": data, "split": args.split, "seed": trained["seed"]} | results, hypotheses, args.out or args.run)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:  # a fault of the input: its sentence, without our call stack
        sys.exit(f"error: {error}")
