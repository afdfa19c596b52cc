"""Word error rate of a run, clean and in noise, and what its routers do.

    python eval.py RUN                                       # the test split of its corpus, in clean sound
    python eval.py RUN --snr clean 5 2.5 0 -2.5 -5 --num-beams 15
    python eval.py RUN --data OTHER_DIR --split valid --noise babble.wav --snr 0
    torchrun --standalone --nproc_per_node 4 eval.py RUN     # several GPUs: the same results

Needs the run folder, and what it names: the corpus and the pretrained parts. Writes `results.json`, `times.json` and
`hypotheses.jsonl` (snr, id, reference, hypothesis) to --out, or to the run folder, where they replace the training's
results. Noise depends only on the clip's id: all but the times repeats exactly.
"""

import argparse
import json
import math
import platform
import random
import time
import unicodedata
from contextlib import contextmanager
from pathlib import Path

import jiwer
import torch
import transformers
from tqdm import tqdm

from data import ClipDataset, default_workers, load_corpus, make_babble, make_loader, pack
from model import LlamaSMoP
from tools import run as runs
from tools.checks import check_clips
from tools.errors import InputError, run_command
from tools.features import Features, raw_of, version_at
from tools.media import load_audio


def parse_snr(text):
    """ "clean" -> None, "0" -> 0.0 dB."""
    try:
        snr = None if text == "clean" else float(text)
    except ValueError:
        snr = math.nan
    if snr is not None and not abs(snr) <= 100:
        raise InputError(f"an SNR is clean or a number of dB between -100 and 100, got {text!r}")
    return snr


def name_snr(snr):
    return "clean" if snr is None else f"{snr:g}"


def load_noise(path, data):
    """The noise in the file `path`; without a path, babble made from the train split of `data`."""
    if not path:
        return make_babble(*load_corpus(data, "train"))
    noise = load_audio(path)
    if not noise.any():
        raise InputError(f"{path}: silent, no noise")
    return noise


# --- decoding ----------------------------------------------------------------------------------------------------


def evaluate(model, clips, load, noise=None, snrs=(None,), num_beams=1, max_frames=2000, workers=0, normalize=False):
    """(results, hypotheses): the WER at each SNR with its interval, the routing at the first SNR, and every text.

    Under torchrun the processes share the clips, and each one returns the whole.
    """
    start = time.time()
    rank, world = runs.rank_and_world()
    batches = pack([clip.frames for clip in clips], max_frames)[rank::world]
    wer, interval, cut, hypotheses = {}, {}, {}, []  # cut: how many transcripts reached their largest length
    for snr in snrs:
        dataset = ClipDataset(clips, load, model.modalities, noise=noise, snr=snr)
        loader = make_loader(dataset, batches, workers, model.device.type == "cuda")
        texts, cut_ids = [], []
        with record_routing(model) as routings:
            for batch in tqdm(loader, f"decode {name_snr(snr)}", unit="batch", leave=False, disable=rank > 0):
                ids = model.generate_ids(batch, num_beams)
                texts += zip(batch["ids"], model.decode(ids))
                lengths = (ids.cpu() == model.tokenizer.eos_token_id).int().argmax(1)  # tokens before EOS
                cut_ids += [name for name, end in zip(batch["ids"], lengths >= model.most_tokens(batch)) if end]
        name = name_snr(snr)
        texts, cut[name] = dict(runs.gather(texts)), len(runs.gather(cut_ids))
        if snr == snrs[0]:
            routing = routing_statistics(runs.gather(routings))
        hypotheses += [{"snr": name, "id": c.id, "reference": c.text, "hypothesis": texts[c.id]} for c in clips]
        wer[name], interval[name] = word_error_rate([c.text for c in clips], [texts[c.id] for c in clips], normalize)
    cuda = model.device.type == "cuda"
    results = {name: model.config[name] for name in ("task", "projector", "num_experts", "top_k")} | {
        "wer": wer,
        "wer_95": interval,
        "cut": cut,
        "clips": len(clips),
        "num_beams": num_beams,
        "scoring": "lower case" + ", NFC, no punctuation" * normalize,
        "routing": routing,
        "seconds": round(time.time() - start, 1),
        "device": torch.cuda.get_device_name(model.device) if cuda else f"{platform.machine()} {model.device.type}",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    return results, hypotheses


# --- word error rate ---------------------------------------------------------------------------------------------


def score_form(text, normalize=False):
    """A text as it is scored: lower case, as in the published scoring, and single spaces. normalize: in Unicode's composed
    form (NFC) and without punctuation, too."""
    if normalize:
        text = unicodedata.normalize("NFC", text)
        text = "".join(c for c in text if not unicodedata.category(c).startswith("P"))
    return " ".join(text.lower().split())


def count_errors(references, hypotheses, normalize=False):
    """[(word errors, reference words)] of each clip. Where nothing is said, every word is an error."""
    clips = []
    for reference, hypothesis in zip(references, hypotheses):
        reference, hypothesis = score_form(reference, normalize), score_form(hypothesis, normalize)
        if not reference:
            clips.append((len(hypothesis.split()), 0))
            continue
        words = jiwer.process_words(reference, hypothesis)
        errors = words.substitutions + words.deletions + words.insertions
        clips.append((errors, len(reference.split())))
    return clips


def bootstrap(clips, statistic, resamples=1000):
    """95 % interval of statistic(clips), over resamples of the clips."""
    rng = random.Random(0)
    values = sorted(statistic(rng.choices(clips, k=len(clips))) for _ in range(resamples))
    return [round(values[int(q * resamples)], 2) for q in (0.025, 0.975)]


def word_error_rate(references, hypotheses, normalize=False):
    """Corpus WER in percent (all errors over all reference words) and its 95 % bootstrap interval over clips."""
    clips = count_errors(references, hypotheses, normalize)

    def rate(sample):
        return 100 * sum(errors for errors, _ in sample) / max(sum(length for _, length in sample), 1)

    return round(rate(clips), 2), bootstrap(clips, rate)


# --- routing -----------------------------------------------------------------------------------------------------


@contextmanager
def record_routing(model):
    """A list that receives the routing of each batch, {modality: Routing} on the CPU, while the context is open."""
    routings = []

    def record(module, inputs, outputs):
        routing = outputs[1].by_modality
        routings.append({modality: type(r)(*(x.detach().cpu() for x in r)) for modality, r in routing.items()})

    hook = model.projector.register_forward_hook(record)
    try:
        yield routings
    finally:
        hook.remove()


def routing_statistics(routings):
    """{modality: {"usage": share of tokens that chose each expert, "entropy": of the router, in nats}}."""
    statistics = {}
    for modality in routings[0]:
        experts, logits = (torch.cat([getattr(r[modality], x) for r in routings]) for x in ("experts", "logits"))
        usage = experts.flatten().bincount(minlength=logits.shape[-1]) / len(experts)
        entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
        statistics[modality] = {"usage": [round(u, 4) for u in usage.tolist()], "entropy": round(entropy.item(), 4)}
    return statistics


# --- the command -------------------------------------------------------------------------------------------------


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
    print(f"{'SNR (dB)':>9} {'WER (%)':>8}  95 % interval, scored in {results['scoring']}")
    for snr, wer in results["wer"].items():
        cut = f"  ({results['cut'][snr]} transcripts reached the length limit)" if results["cut"][snr] else ""
        print(f"{snr:>9} {wer:8.2f}  {results['wer_95'][snr]}{cut}")
    for modality, statistics in results["routing"].items():
        print(f"{modality}: experts chosen by {statistics['usage']} of the tokens, entropy {statistics['entropy']}")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", type=Path, help="folder written by train.py or LlamaSMoP.save")
    add("--data", help='"synthetic" or a folder of manifests (default: that of the training)')
    add("--split", default="test", help="name of the manifest (default: test)")
    add("--snr", nargs="+", default=["clean"], help="dB or clean (default: clean)")
    add("--noise", help="audio file (default: that of the training, or babble of its train split)")
    add("--num-beams", type=int, default=1, help="1 is greedy (published: 15)")
    add("--max-frames", type=int, help="video frames per batch (default: that of the training)")
    add("--normalize", action="store_true", help="score without punctuation and in NFC (default: only in lower case)")
    add("--allow-empty", action="store_true", help="take clips without speech, whose transcript is empty")
    add("--out", type=Path, help="folder for the results (default: the run folder)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="any of torch's")
    return parser.parse_args()


def main():
    args = parse_args()
    trained = {"data": None, "noise": None, "seed": None, "max_frames": 2000}  # not by train.py
    if (args.run / "args.json").is_file():
        trained = json.loads((args.run / "args.json").read_text())
    data = args.data or trained["data"]
    if data is None and (args.run / "config.json").is_file():
        raise InputError(f"{args.run}: not trained by train.py, so --data must say what to evaluate on")
    rank, _, device = runs.join_processes(args.device)
    model = LlamaSMoP.load(args.run)
    snrs = [parse_snr(snr) for snr in args.snr]
    if "audio" not in model.modalities and snrs != [None]:
        raise InputError(f"{args.run}: a model without audio has no SNR")
    clips, load = load_corpus(data, args.split, args.allow_empty)
    check_clips(model, clips)
    noise = None
    if isinstance(load, Features):
        if args.noise:
            raise InputError(f"--noise: the features in {data} have theirs")
        load.check(model, {version_at(snr): clips for snr in snrs})
    elif any(snr is not None for snr in snrs):
        noise = load_noise(args.noise or trained["noise"], raw_of(trained["data"] or data))
    model.to(device)
    max_frames = args.max_frames or trained["max_frames"]
    results, hypotheses = evaluate(
        model, clips, load, noise, snrs, args.num_beams, max_frames, default_workers(device), args.normalize
    )
    if rank == 0:
        report({"data": data, "split": args.split, "seed": trained["seed"]} | results, hypotheses, args.out or args.run)
    runs.leave_processes()


if __name__ == "__main__":
    run_command(main)
