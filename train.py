"""Train Llama-SMoP; a plain PyTorch loop.

    python train.py                                      # minutes on two CPU cores: synthetic corpus, small models
    python train.py --data MANIFEST_DIR --task avsr --llm meta-llama/Llama-3.2-1B \\
        --audio-encoder openai/whisper-medium.en --video-encoder large_vox_iter5.pt --out runs/avsr
    torchrun --standalone --nproc_per_node 4 train.py ...    # several GPUs

Repeat the command to continue a run that was interrupted or killed. The folder --out receives the model (config.json,
model.safetensors, tokenizer), its results on the test split, the log and the checkpoint (tools/run.py).
"""

import argparse
import dataclasses
import json
import math
import os
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

import synthetic
from data import FPS, ClipDataset, default_workers, load_corpus, make_loader, pack, plan_run
from encoders import MODALITIES, is_trained
from eval import evaluate, load_noise, parse_snr, record_routing, report, routing_statistics
from model import LlamaSMoP, Losses
from tools import run as runs
from tools.checks import check_clips
from tools.errors import InputError, run_command
from tools.features import SETTINGS, Features, is_features, raw_of, version_at
from tools.picture import draw_clip
from tools.tokenizer import load_tokenizer, train_tokenizer

SMALL_LLM = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.08,
}
SMALL_WHISPER = {
    "d_model": 128,
    "encoder_layers": 1,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 256,
    "init_std": 0.1,
}
SMALL_AVHUBERT = {
    "dim": 128,
    "layers": 1,
    "heads": 4,
    "ffn_dim": 256,
    "stem_width": 8,
    "stem_stride": 8,
    "trunk_widths": [8, 16, 32, 64],
    "conv_pos": 32,
}
# Defaults of what is not given. From scratch, the published rates, or noise from the start, leave a model on a plateau.
FROM_SCRATCH = {"epochs": 6, "clean_epochs": 3, "max_frames": 320, "lr": 4e-4}
PUBLISHED = {"epochs": 10, "clean_epochs": 0, "max_frames": 1500, "lr": 1e-3}  # with a pretrained LLM; lr 5e-4 for vsr
POOLS = {"audio_pool": 4, "video_pool": 2}

COLLAPSE_SHARE = 0.95  # of a router's choices that go to its top_k busiest experts


def arg(default, help):
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass
class Args:
    data: str = arg(
        "synthetic", '"synthetic", a folder with train.csv, valid.csv and test.csv, or one of tools/encode.py'
    )
    out: str = arg("runs/default", "run folder to write")
    task: str = arg("avsr", "asr, vsr or avsr")
    # model
    projector: str = arg("dedr", "mlp, jejr, jedr or dedr")
    num_experts: int = arg(4, "experts in each mixture")
    top_k: int = arg(2, "experts a token passes through")
    dim_hidden: int | None = arg(None, "width inside an expert (default: the LLM's)")
    llm: str = arg(json.dumps(SMALL_LLM), "hub name or folder of a Llama (LoRA), or JSON of LlamaConfig (from scratch)")
    audio_encoder: str = arg(
        json.dumps(SMALL_WHISPER), "hub name, folder or run folder (frozen), or JSON of WhisperConfig"
    )
    video_encoder: str = arg(
        json.dumps(SMALL_AVHUBERT), "AV-HuBERT file or run folder (frozen), or JSON of AVHubertEncoder's arguments"
    )
    audio_pool: int | None = arg(None, "audio frames averaged into a token (default: 4)")
    video_pool: int | None = arg(None, "video frames averaged into a token (default: 2)")
    audio_window: str | None = arg(None, "what Whisper hears: 30s or clip (default: 30s if pretrained, else clip)")
    lora_rank: int | None = arg(None, "rank of LoRA (default: a 32nd of the LLM's width)")
    lora_scale: float = arg(0.125, "factor of LoRA's update")
    prompt: str | None = arg(None, "text before the transcript (default: the published one, none for a random LLM)")
    load_balancing_weight: float = arg(0.01, "of the load-balancing loss")
    router_z_weight: float = arg(0.001, "of the router z-loss")
    # optimisation
    epochs: int | None = arg(None, "passes over the train split (default: 6; 10 with a pretrained LLM)")
    lr: float | None = arg(None, "peak learning rate (default: 4e-4; 1e-3 with a pretrained LLM, 5e-4 for its vsr)")
    warmup: float = arg(0.05, "share of the steps with a rising learning rate; a cosine follows")
    weight_decay: float = arg(0.1, "of AdamW")
    clip_grad: float = arg(1.0, "largest norm of the gradient")
    max_frames: int | None = arg(
        None, "video frames per batch and process, with padding (default: 320; 1500 with a pretrained LLM)"
    )
    accumulate: int = arg(1, "batches per step")
    clean_epochs: int | None = arg(
        None, "epochs at the start without noise and masks (default: 3; 0 with a pretrained LLM)"
    )
    noise: str | None = arg(None, "audio file of noise (default: babble made of the train split)")
    seed: int = arg(0, "of the weights, the order and the augmentation")
    # running
    workers: int | None = arg(None, "data-loading processes (default: 2; for a GPU, one per core, at most 16)")
    save_every: int = arg(0, "steps between checkpoints within an epoch (0: after epochs only)")
    average: int = arg(1, "how many of the last epochs' weights are averaged for evaluation")
    eval_snr: str = arg("clean 5 0 -5", "SNRs (dB) of the final evaluation; a task without audio knows only clean")
    num_beams: int = arg(1, "of the final evaluation")
    device: str = arg("cuda" if torch.cuda.is_available() else "cpu", "any of torch's: cpu, cuda, cuda:1, mps")

    def __post_init__(self):
        if is_features(self.data):
            self.take_encoders(Features(self.data).facts)
        recipe = FROM_SCRATCH if self.llm.startswith("{") else PUBLISHED | ({"lr": 5e-4} if self.task == "vsr" else {})
        for name, value in (recipe | POOLS).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.task not in MODALITIES:
            raise InputError(f"--task must be one of {', '.join(MODALITIES)}, got {self.task!r}")
        for name in "num_experts top_k audio_pool video_pool epochs lr clip_grad max_frames accumulate average num_beams".split():
            if not getattr(self, name) > 0:
                raise InputError(f"--{flag(name)} must be above 0, got {getattr(self, name)}")
        if self.workers is None:
            self.workers = default_workers(self.device)
        if self.workers < 0:
            raise InputError(f"--workers must be at least 0, got {self.workers}")
        for name, most in (("top_k", "num_experts"), ("average", "epochs")):
            if getattr(self, name) > getattr(self, most) and (name, self.projector.lower()) != ("top_k", "mlp"):
                raise InputError(
                    f"--{flag(name)} {getattr(self, name)} is more than --{flag(most)} {getattr(self, most)}"
                )
        self.snrs = [parse_snr(snr) for snr in self.eval_snr.split()] if "audio" in MODALITIES[self.task] else [None]
        if not self.snrs:
            raise InputError("--eval-snr is empty; expected clean or a number of dB, or several with spaces between")
        for name in ("data", "noise", "llm", "audio_encoder", "video_encoder"):  # args.json must hold from anywhere
            if getattr(self, name) not in (None, "synthetic") and os.path.exists(getattr(self, name)):
                setattr(self, name, os.path.abspath(getattr(self, name)))

    def take_encoders(self, facts):
        """Arguments that are not given are taken from the features. `Features.check` refuses other encoders."""
        if self.noise and os.path.abspath(self.noise) != facts["noise"]:
            raise InputError(f"--noise: the features in {self.data} have theirs")
        for name in SETTINGS:
            if getattr(self, name) == getattr(Args, name):
                setattr(self, name, facts[name] or getattr(Args, name))


# What --resume may change: nothing that alters the data or its order.
CHANGEABLE = ("lr", "clip_grad", "device", "workers", "num_beams", "save_every")


def flag(name):
    return name.replace("_", "-")


def parse_args(argv=None):
    """(Args, whether --resume was given, whether --overwrite was) of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    names = ", ".join(f"--{flag(name)}" for name in CHANGEABLE)
    add("--resume", metavar="RUN", help=f"continue this run with its arguments; only {names} may change")
    add("--overwrite", action="store_true", help="delete the run in --out and start anew")
    for field in dataclasses.fields(Args):
        kind = {"int | None": int, "float | None": float, "str | None": str}.get(str(field.type), field.type)
        text = field.metadata["help"] + ("" if field.default is None else f" (default: {field.default})")
        several = {"nargs": "+"} if field.name == "eval_snr" else {}
        add(f"--{flag(field.name)}", type=kind, default=argparse.SUPPRESS, help=text.replace("%", "%%"), **several)
    given = vars(parser.parse_args(argv))
    if "eval_snr" in given:
        given["eval_snr"] = " ".join(given["eval_snr"])
    run, overwrite = given.pop("resume"), given.pop("overwrite")
    if run is None:
        return Args(**given), False, overwrite
    if fixed := given.keys() - set(CHANGEABLE):
        raise InputError(f"--resume takes all but {names} from {run}/args.json; drop --{', --'.join(map(flag, fixed))}")
    if not (Path(run) / "args.json").is_file():
        raise InputError(f"{run}: no args.json; expected a folder written by train.py")
    begun = json.loads((Path(run) / "args.json").read_text())
    if other := begun.keys() ^ {field.name for field in dataclasses.fields(Args)}:
        raise InputError(f"{run}/args.json: of another version of train.py, differing in {', '.join(sorted(other))}")
    return Args(**begun | given | {"out": run}), True, overwrite


def build_model(args, tokenizer=None):
    """LlamaSMoP as the arguments say. tokenizer: by default that of the LLM; a random LLM needs one."""
    parts = []
    for name in ("llm", "audio_encoder", "video_encoder"):
        source = getattr(args, name)
        try:
            parts.append(json.loads(source) if source.startswith("{") else source)
        except json.JSONDecodeError as error:
            raise InputError(f"--{flag(name)}: not valid JSON: {error}") from None
    names = "num_experts top_k dim_hidden audio_pool video_pool lora_rank lora_scale prompt".split()
    settings = {name: getattr(args, name) for name in [*names, "load_balancing_weight", "router_z_weight"]}
    settings |= {"projector": args.projector.upper(), "audio_window": args.audio_window}
    return LlamaSMoP(args.task, *parts, tokenizer=tokenizer, **settings)


def learning_rate(step, steps, warmup):
    """Factor of the peak rate: linear warm-up over the share `warmup` of the steps, then a cosine to 0."""
    rising = max(round(warmup * steps), 1)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(steps - rising, 1)))


# --- the loop ----------------------------------------------------------------------------------------------------


def train_steps(model, optimizer, plan, done, batches, valid_batches, run, args, at_epoch_end):
    """Run the steps that remain, plan[done:]. `batches` yields each step's batches in order and, after each epoch,
    `valid_batches` batches of the valid split for `at_epoch_end`."""
    layer_drop = "video" in model.modalities and is_trained(model.video_encoder)  # skips AV-HuBERT's layers at random
    wrapped = runs.distribute(model, unused=layer_drop)
    trained = optimizer.param_groups[0]["params"]
    bar = tqdm(total=len(plan), initial=done, unit="step", disable=not run.writes)
    with bar, runs.Signals() as signals:
        for number, step in enumerate(plan[done:], start=done + 1):
            model.train()
            parts, ids = [], []
            for i, weight in enumerate(step.weights):
                batch = next(batches)
                runs.seed_step(args.seed, number, i)
                last = i == len(step.weights) - 1
                wrapped.require_backward_grad_sync = last  # read by DDP: processes exchange gradients once a step
                losses = wrapped(batch)
                # The step's loss: the mean over all its transcript tokens, and the mean of its batches' routing losses.
                part = Losses(weight * losses.lm, *(loss / len(step.weights) for loss in losses[1:]))
                part.total.backward()
                parts.append(torch.stack(part).detach())
                ids += batch["ids"]
            grad_norm = torch.nn.utils.clip_grad_norm_(trained, args.clip_grad)
            values = dict(zip(Losses._fields, torch.stack(parts).sum(0))) | {"grad_norm": grad_norm}
            values = runs.mean_over_processes(values | {"stop": signals.seen()})
            stop = values.pop("stop")
            if not all(map(math.isfinite, values.values())):
                raise InputError(not_finite(values, number, runs.gather(ids), args.out))
            rate = args.lr * learning_rate(number - 1, len(plan), args.warmup)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            run.log(step=number, epoch=step.epoch, **values, lr=rate)
            bar.update()
            bar.set_postfix({name: f"{values[name]:.2f}" for name in ("lm", "load_balancing", "router_z")})
            if step.last:
                runs.share_state(model)
                at_epoch_end(model, step.epoch, number, islice(batches, valid_batches), run, args)
            if step.last or stop or args.save_every and number % args.save_every == 0:
                run.save(model, optimizer, number)
            if stop:
                raise KeyboardInterrupt


def not_finite(values, number, ids, out):
    return (
        f"step {number}: a loss or gradient is not finite ({values}); the last checkpoint is kept, and "
        f"train.py --resume {out} --lr RATE continues a run of train.py; clips of this step: {', '.join(ids)}"
    )


@torch.no_grad()
def end_epoch(model, epoch, step, batches, run, args):
    """Loss and routing on the valid split, clean; `batches` are this process's share of it."""
    model.eval()
    lm, tokens = torch.zeros(2, device=model.device)
    with record_routing(model) as routings:
        for batch in batches:
            count = int(model.count_tokens(batch["texts"]).sum())
            lm, tokens = lm + count * model(batch).lm, tokens + count
    means = runs.mean_over_processes({"lm": lm, "tokens": tokens})
    routings = runs.gather(routings)
    usage = {modality: x["usage"] for modality, x in routing_statistics(routings).items()}
    run.log(step=step, epoch=epoch, valid_lm=means["lm"] / means["tokens"], usage=usage)
    if args.average > 1 and epoch >= args.epochs - args.average:
        run.keep_epoch(model, epoch)
    if run.writes:
        warn_of_collapse(model, routings, epoch)


def warn_of_collapse(model, routings, epoch):
    """Warn if a router sends nearly all tokens to the same top_k experts."""
    top_k = model.projector.top_k
    for router, gate in model.projector.gates.items():
        own = [m for m in model.modalities if model.projector.router_of[m] == router]
        experts = torch.cat([r[modality].experts.flatten() for r in routings for modality in own])
        shares = experts.bincount(minlength=gate.out_features) / len(experts)
        if gate.out_features > top_k and shares.topk(top_k).values.sum() > COLLAPSE_SHARE:
            tqdm.write(
                f"warning: a router has collapsed, after epoch {epoch} its experts have {shares.tolist()} of its choices; "
                "raise --load-balancing-weight or lower --lr"
            )


# --- a run -------------------------------------------------------------------------------------------------------


def train(args, resume=False, overwrite=False):
    rank, world, device = runs.join_processes(args.device)
    # Leave a core to each worker: arithmetic waits for its slowest thread, the one that shares a core.
    torch.set_num_threads(max(min(torch.get_num_threads(), (os.cpu_count() or 1) - args.workers), 1))
    torch.manual_seed(args.seed)
    (clips, load), (valid, _), (test, _) = (load_corpus(args.data, split) for split in ("train", "valid", "test"))
    run = runs.RunFolder(args.out, rank)
    run.begin(dataclasses.asdict(args), resume, overwrite)

    tokenizer = None
    if run.checkpoint.exists():
        tokenizer = load_tokenizer(run.path)  # a changed train.csv must not give the tokens other numbers
    elif args.llm.startswith("{"):
        tokenizer = train_tokenizer([clip.text for clip in clips])
    model = build_model(args, tokenizer)
    check_clips(model, [*clips, *valid, *test])
    if isinstance(load, Features):
        evaluated = dict.fromkeys(map(version_at, args.snrs), test)
        load.check(model, dict.fromkeys(load.copies, clips) | evaluated | {"clean": [*clips, *valid, *test]})
    model.to(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, args.lr, betas=(0.9, 0.98), weight_decay=args.weight_decay, fused=True)
    run.facts = {"processes": world, "train split (checksum)": runs.fingerprint(clips)}
    done = run.restore(model, optimizer)
    if run.writes and not done:
        model.tokenizer.save_pretrained(run.path)
    noisy = "audio" in model.modalities and not isinstance(load, Features)
    noise = load_noise(args.noise, args.data) if noisy else None

    frames, tokens = [clip.frames for clip in clips], model.count_tokens([clip.text for clip in clips]).tolist()
    model.config["tokens_per_second"] = max(FPS * n / length for n, length in zip(tokens, frames))
    plan = plan_run(frames, tokens, args.epochs, args.max_frames, args.accumulate, args.seed, rank, world)
    valid_batches = pack([clip.frames for clip in valid], args.max_frames)[rank::world]
    keys = keys_of(plan[done:], valid_batches, len(clips))
    dataset = ClipDataset([*clips, *valid], load, model.modalities, noise, None, args.seed, args.clean_epochs)
    batches = iter(make_loader(dataset, keys, args.workers, device.type == "cuda"))
    if run.writes:
        describe(model, clips, plan)
    train_steps(model, optimizer, plan, done, batches, len(valid_batches), run, args, end_epoch)

    if args.average > 1:
        model.load_trained_state(run.average(range(args.epochs - args.average, args.epochs)))
    if run.writes:
        model.save(run.path)
        print(f"trained in {run.minutes():.1f} minutes; evaluating on the test split")
    model.eval()
    results, hypotheses = evaluate(model, test, load, noise, args.snrs, args.num_beams, args.max_frames, args.workers)
    if run.writes:
        about = {"data": args.data, "split": "test", "seed": args.seed, "training_minutes": round(run.minutes(), 1)}
        report(about | results, hypotheses, run.path)
        draw(model, args, test[0].id, run.path / "clip.png")
    runs.leave_processes()


def draw(model, args, name, path):
    """The picture of a test clip, for which the corpus is needed, also by a run on features."""
    try:
        clips, load = load_corpus(raw_of(args.data), "test")
        clip = next((clip for clip in clips if clip.id == name), None)
        if clip is None:
            raise InputError(f"no clip {name} in {raw_of(args.data)}")
        item = ClipDataset([clip], load, model.modalities)[0]
    except InputError as error:
        return print(f"no {path}: {error}")  # the features' corpus may be gone
    words = synthetic.word_times(clip.id) if clip.path is None else ()
    draw_clip(model, clip, item, path, words)
    print(f"look at {path}: a test clip, and the experts that its tokens chose")


def keys_of(plan, valid_batches, train_clips):
    """The keys of a run's batches in order: (clip, epoch) of the train split; after an epoch, the valid clips as they are."""
    for step in plan:
        yield from [[(clip, step.epoch) for clip in batch] for batch in step.batches]
        if step.last:
            yield from [[train_clips + clip for clip in batch] for batch in valid_batches]


def describe(model, clips, plan):
    print(f"{len(clips)} clips, {len(plan)} steps; parameters trained, in millions:")
    for name, part in model.named_children():
        trained = sum(p.numel() for p in part.parameters() if p.requires_grad)
        print(f"  {name}: {trained / 1e6:.2f} of {sum(p.numel() for p in part.parameters()) / 1e6:.2f}")


def main():
    args, resume, overwrite = parse_args()
    try:
        train(args, resume, overwrite)
    except KeyboardInterrupt:
        print("interrupted; repeat the command, without --overwrite, to continue", flush=True)
        raise


if __name__ == "__main__":
    run_command(main)
