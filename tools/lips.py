"""Train a lip encoder from scratch, for those without AV-HuBERT's weights.

    python -m tools.lips DATA OUT                                    # DATA: prepared mouths, e.g. of GRID
    python train.py --data DATA --task vsr --video-encoder OUT ...   # frozen from here on

An `AVHubertEncoder` with a linear layer to characters learns to spell the transcripts with CTC (Graves et al., 2006).
What it learns depends on no projector and no LLM, so that those can be compared on its features. OUT is a run folder:
repeat an interrupted command to continue it. results.json has the WER of greedy CTC on the valid and test splits.
"""

import argparse
import itertools
import json

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from data import ClipDataset, default_workers, load_corpus, make_loader, pack, plan_run
from encoders import Encoders
from eval import word_error_rate
from model import Losses
from tools import run as runs
from tools.errors import InputError, run_command
from tools.features import Features
from train import keys_of, train_steps

# dim is that of Whisper-base, so that JEJR and JEDR can share.
ENCODER = {"dim": 512, "layers": 2, "heads": 8, "ffn_dim": 1024, "stem_width": 16, "stem_stride": 8}
ENCODER |= {"trunk_widths": [16, 32, 64, 128], "conv_pos": 32, "dropout": 0.1}
# Arguments of train.py that are fixed here.
SETTINGS = {"max_frames": 900, "warmup": 0.05, "weight_decay": 0.1, "clip_grad": 1.0, "save_every": 0}


class LipReader(Encoders):
    """From lips to characters: class 0 is CTC's blank, class i + 1 the i-th of `characters`."""

    def __init__(self, characters, settings):
        super().__init__("vsr", None, settings, video_pool=1)
        self.characters = characters
        self.head = nn.Linear(self.widths["video"], 1 + len(characters))

    def forward(self, batch):
        """Losses of a batch of `data.collate`; lm is CTC's, a mean over the characters."""
        targets = torch.tensor([1 + self.characters.index(c) for text in batch["texts"] for c in text])
        lengths = torch.tensor([len(text) for text in batch["texts"]])
        scores = self.score(batch).transpose(0, 1)  # (T, B, classes)
        loss = F.ctc_loss(scores, targets.to(self.device), batch["video_lengths"], lengths, reduction="sum")
        return Losses(loss / lengths.sum(), *torch.zeros(3, device=self.device))

    def score(self, batch):
        """Log-probabilities of the classes, (B, T, classes)."""
        with self.autocast():
            scores = self.head(self.encode_video(batch))
        return scores.float().log_softmax(-1)

    @torch.no_grad()
    def read(self, batch):
        """Greedy CTC: the best class of each frame, repetitions as one, without blanks."""
        texts = []
        for classes, length in zip(self.score(batch).argmax(-1).tolist(), batch["video_lengths"]):
            runs_of_one = (c for c, _ in itertools.groupby(classes[:length]))
            texts.append("".join(self.characters[c - 1] for c in runs_of_one if c))
        return texts

    def trained_state(self):
        return self.state_dict()

    def load_trained_state(self, state):
        self.load_state_dict(state)


def check_spelling(clips):
    """Raise an InputError unless the transcripts fit: CTC writes at most a character a frame, and needs a blank between
    two that are the same."""
    for clip in clips:
        needed = len(clip.text) + sum(a == b for a, b in zip(clip.text, clip.text[1:]))
        if needed > clip.frames:
            raise InputError(f"{clip.id}: CTC needs {needed} frames to spell its transcript, but it has {clip.frames}")


def evaluate(model, clips, load, max_frames, workers):
    """WER (%) of greedy CTC and its 95 % interval."""
    model.eval()
    loader = make_loader(ClipDataset(clips, load, ("video",)), pack([c.frames for c in clips], max_frames), workers)
    read = dict(pair for batch in loader for pair in zip(batch["ids"], model.read(batch)))
    return word_error_rate([clip.text for clip in clips], [read[clip.id] for clip in clips])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("data", help="folder of manifests and mouths, see tools/prepare.py")
    add("out", help="run folder to write; train.py and tools/encode.py take it as --video-encoder")
    add("--epochs", type=int, default=30, help="passes over the train split (default: 30)")
    add("--encoder", type=json.loads, default=ENCODER, help="JSON of AVHubertEncoder's arguments")
    add("--lr", type=float, default=6e-4, help="peak learning rate (default: 6e-4)")
    add("--seed", type=int, default=0, help="of the weights, the order and the augmentation (default: 0)")
    add("--overwrite", action="store_true", help="delete the run in OUT and start anew")
    add("--workers", type=int, help="data-loading processes (default: 2; for a GPU, one per core, at most 16)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="any of torch's")
    parser.set_defaults(**SETTINGS)
    train(parser.parse_args())


def train(args):
    if args.workers is None:
        args.workers = default_workers(args.device)
    rank, world, device = runs.join_processes(args.device)
    torch.manual_seed(args.seed)
    (clips, load), (valid, _), (test, _) = (load_corpus(args.data, split) for split in ("train", "valid", "test"))
    if isinstance(load, Features):
        raise InputError(f"{args.data}: features; give the corpus that they were made from")
    check_spelling(clips)
    run = runs.RunFolder(args.out, rank)
    run.begin({name: value for name, value in vars(args).items() if name != "overwrite"}, overwrite=args.overwrite)
    model = LipReader("".join(sorted(set("".join(clip.text for clip in clips)))), args.encoder).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.98), weight_decay=args.weight_decay)
    run.facts = {"processes": world, "train split (checksum)": runs.fingerprint(clips)}
    done = run.restore(model, optimizer)
    frames, characters = [clip.frames for clip in clips], [len(clip.text) for clip in clips]
    plan = plan_run(frames, characters, args.epochs, args.max_frames, 1, args.seed, rank, world)
    dataset = ClipDataset(clips, load, ("video",), seed=args.seed, clean_epochs=args.epochs // 4)
    keys = keys_of(plan[done:], [], len(clips))
    batches = iter(make_loader(dataset, keys, args.workers, device.type == "cuda"))

    def end_epoch(model, epoch, number, *_):
        if run.writes and epoch % 5 == 4:
            run.log(step=number, epoch=epoch, valid_wer=evaluate(model, valid, load, args.max_frames, args.workers)[0])

    train_steps(model, optimizer, plan, done, batches, 0, run, args, end_epoch)
    if run.writes:
        wer = {}
        for split, clips in (("valid", valid), ("test", test)):
            wer[split], interval = evaluate(model, clips, load, args.max_frames, args.workers)
            print(f"{split}: WER {wer[split]} % {interval}")
        config = {"task": "vsr", "video_encoder": args.encoder}  # as of a run of train.py
        (run.path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file(model.state_dict(), run.path / "model.safetensors")
        (run.path / "results.json").write_text(json.dumps({"wer": wer, "minutes": round(run.minutes(), 1)}) + "\n")
    runs.leave_processes()


if __name__ == "__main__":
    run_command(main)
