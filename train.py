"""Train Llama-SMoP; a plain PyTorch loop.

    python train.py                                      # minutes on two CPU cores: synthetic corpus, small models
    python train.py --data MANIFEST_DIR --task avsr --llm meta-llama/Llama-3.2-1B \\
        --audio-encoder openai/whisper-medium.en --video-encoder large_vox_iter5.pt --out runs/avsr
    torchrun --standalone --nproc_per_node 4 train.py ...    # several GPUs
    python train.py --resume runs/avsr                   # continue a run that was interrupted or killed

The folder --out receives args.json, the model (config.json, model.safetensors, tokenizer), checkpoint.pt to resume
from, metrics.jsonl, and the files of eval.py, which ends the training.
"""

import argparse
import dataclasses
import json
import math
import os
import random
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import TASKS, ClipDataset, FrameBatches, load_corpus, make_loader
from eval import evaluate, fault, gather, join_processes, load_noise, own_batches, parse_snr, report
from model import LlamaSMoP, is_trained, train_tokenizer, write_atomically

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two runs out of one folder
    fcntl = None

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

COLLAPSE_SHARE = 0.95  # of a router's weight on its top_k busiest experts, over an epoch


def arg(default, help, least=None, most=None):
    return dataclasses.field(default=default, metadata={"help": help, "least": least, "most": most})


def flag(name):
    return name.replace("_", "-")


@dataclass
class Args:
    data: str = arg("synthetic", '"synthetic" or a folder with the manifests train.csv, valid.csv and test.csv')
    out: str = arg("runs/default", "run folder to write")
    task: str = arg("avsr", "asr, vsr or avsr")
    # model
    projector: str = arg("dedr", "mlp, jejr, jedr or dedr")
    num_experts: int = arg(4, "experts in each mixture", 1, 1024)
    top_k: int = arg(2, "experts a token passes through", 1, 1024)
    dim_hidden: int | None = arg(None, "width inside an expert (default: the LLM's)", 1, 65_536)
    llm: str = arg(json.dumps(SMALL_LLM), "hub name or folder of a Llama (LoRA), or JSON of LlamaConfig (from scratch)")
    audio_encoder: str = arg(json.dumps(SMALL_WHISPER), "hub name or folder (frozen), or JSON of WhisperConfig")
    video_encoder: str = arg(
        json.dumps(SMALL_AVHUBERT), "AV-HuBERT file or run folder (frozen), or JSON of AVHubertEncoder's arguments"
    )
    audio_pool: int = arg(4, "audio frames averaged into a token", 1, 1500)
    video_pool: int = arg(2, "video frames averaged into a token", 1, 750)
    audio_window: str | None = arg(None, "what Whisper sees: 30s or clip (default: 30s if pretrained, else clip)")
    lora_rank: int | None = arg(None, "rank of LoRA (default: a 32nd of the LLM's width)", 1, 4096)
    lora_scale: float = arg(0.125, "factor of LoRA's update", 0, 100)
    prompt: str | None = arg(None, "text before the transcript (default: the published one, none for a random LLM)")
    load_balancing_weight: float = arg(0.01, "of the load-balancing loss", 0, 100)
    router_z_weight: float = arg(0.001, "of the router z-loss", 0, 100)
    # optimisation
    epochs: int | None = arg(None, "passes over the train split (default: 6; 10 with a pretrained LLM)", 1, 10_000)
    lr: float | None = arg(
        None, "peak learning rate (default: 4e-4; 1e-3 with a pretrained LLM, 5e-4 for its vsr)", 1e-9, 1
    )
    warmup: float = arg(0.05, "share of the steps with a rising learning rate; a cosine follows", 0, 1)
    weight_decay: float = arg(0.1, "of AdamW", 0, 10)
    clip_grad: float = arg(1.0, "largest norm of the gradient", 1e-6, 1e6)
    max_frames: int | None = arg(
        None, "video frames per batch and process, with padding (default: 320; 1500 with a pretrained LLM)", 1, 10**6
    )
    accumulate: int = arg(1, "batches per step, weighted equally", 1, 10_000)
    clean_epochs: int | None = arg(
        None, "epochs at the start without noise and masks (default: 3; 0 with a pretrained LLM)", 0, 10_000
    )
    noise: str | None = arg(None, "audio file of noise (default: babble made of the train split)")
    seed: int = arg(0, "of the weights, the order and the augmentation", 0, 2**63 - 1)
    # running
    workers: int = arg(2, "data-loading processes", 0, 256)
    save_every: int = arg(0, "steps between checkpoints within an epoch (0: after epochs only)", 0, 10**9)
    average: int = arg(1, "how many of the last epochs' weights are averaged for evaluation", 1, 10_000)
    eval_snr: str = arg(
        "clean 5 0 -5", "SNRs (dB) of the final evaluation, in quotes; a task without audio knows only clean"
    )
    num_beams: int = arg(1, "of the final evaluation", 1, 100)
    device: str = arg("cuda" if torch.cuda.is_available() else "cpu", "cuda or cpu")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, least, most = getattr(self, field.name), field.metadata["least"], field.metadata["most"]
            if least is not None and value is not None and not least <= value <= most:  # NaN, too
                raise ValueError(f"--{flag(field.name)} must be between {least} and {most}, got {value}")
        recipe = FROM_SCRATCH if self.llm.startswith("{") else PUBLISHED | ({"lr": 5e-4} if self.task == "vsr" else {})
        for name, value in recipe.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.top_k > self.num_experts and self.projector.lower() != "mlp":
            raise ValueError(f"--top-k {self.top_k} is more than --num-experts {self.num_experts}")
        if self.average > self.epochs:
            raise ValueError(f"--average {self.average} is more than --epochs {self.epochs}")


def parse_args(argv=None):
    """(Args, whether to resume) from the command line; --resume takes every argument from its run folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--resume", metavar="RUN", help="continue this run, with its arguments")
    for field in dataclasses.fields(Args):
        kind = {"int | None": int, "float | None": float, "str | None": str}.get(str(field.type), field.type)
        text = field.metadata["help"] + ("" if field.default is None else f" (default: {field.default})")
        parser.add_argument(f"--{flag(field.name)}", type=kind, default=argparse.SUPPRESS, help=text.replace("%", "%%"))
    given = vars(parser.parse_args(argv))
    run = given.pop("resume", None)
    if run is None:
        return Args(**given), False
    if given:
        parser.error(f"--resume takes every argument from {run}/args.json; drop --{', --'.join(map(flag, given))}")
    if not (Path(run) / "args.json").is_file():
        parser.error(f"{run}: no args.json; expected a folder written by train.py")
    given = json.loads((Path(run) / "args.json").read_text())
    other = given.keys() ^ {field.name for field in dataclasses.fields(Args)}
    if other:
        raise ValueError(f"{run}/args.json: of another version of train.py, differing in {', '.join(sorted(other))}")
    return Args(**given | {"out": run}), True


def build_model(args, texts):
    """LlamaSMoP as the arguments say; a random LLM gets a tokenizer trained on `texts`."""
    parts = []
    for name in ("llm", "audio_encoder", "video_encoder"):
        source = getattr(args, name)
        try:
            parts.append(json.loads(source) if source.startswith("{") else source)
        except json.JSONDecodeError as error:
            raise ValueError(f"--{flag(name)}: not valid JSON: {error}") from None
    window = args.audio_window or ("clip" if isinstance(parts[1], dict) else "30s")
    return LlamaSMoP(
        args.task,
        *parts,
        tokenizer=train_tokenizer(texts) if isinstance(parts[0], dict) else None,
        projector=args.projector.upper(),
        audio_window=window,
        **{
            name: getattr(args, name)
            for name in "num_experts top_k dim_hidden audio_pool video_pool lora_rank lora_scale prompt "
            "load_balancing_weight router_z_weight".split()
        },
    )


def learning_rate(step, steps, warmup):
    """Factor of the peak rate: linear warm-up over the share `warmup` of the steps, then a cosine to 0."""
    rise = max(round(warmup * steps), 1)
    return (step + 1) / rise if step < rise else 0.5 * (1 + math.cos(math.pi * (step - rise) / max(steps - rise, 1)))


def hold(folder):
    """Lock a run folder for as long as this process lives, however it ends; a ValueError where another one holds it."""
    file = open(folder / "lock", "w")
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which the workers of a killed run would hold
    except OSError:
        raise ValueError(f"{folder}: another process is training this run") from None
    return file


def main():
    args, resume = parse_args()
    try:
        train(args, resume)
    except KeyboardInterrupt:
        sys.exit(f"interrupted; continue with: python train.py --resume {args.out}")


def train(args, resume):
    if args.task not in TASKS:
        raise ValueError(f"--task must be one of {', '.join(TASKS)}, got {args.task!r}")
    out = Path(args.out)
    for name in ("data", "noise", "llm", "audio_encoder", "video_encoder"):  # args.json must hold from anywhere
        if getattr(args, name) not in (None, "synthetic") and os.path.exists(getattr(args, name)):
            setattr(args, name, os.path.abspath(getattr(args, name)))
    rank, world, device = join_processes(args.device)
    # Leave a core to each worker: arithmetic is as slow as its slowest thread, one that shares its core.
    torch.set_num_threads(max(min(torch.get_num_threads(), (os.cpu_count() or 1) - args.workers), 1))
    torch.manual_seed(args.seed)

    (clips, load), (valid, _), (test, _) = (load_corpus(args.data, split) for split in ("train", "valid", "test"))
    has_audio = "audio" in TASKS[args.task]
    snrs = [parse_snr(snr) for snr in args.eval_snr.split()] if has_audio else [None]
    if not snrs:
        raise ValueError("--eval-snr is empty; expected clean or a number of dB, or several with spaces between")
    out.mkdir(parents=True, exist_ok=True)
    lock = hold(out) if rank == 0 else None  # noqa: F841 (held until the end)
    begun = (out / "checkpoint.pt").exists()
    if begun and not resume:
        sys.exit(f"error: {out} holds a run; continue it with --resume {out}, or choose another --out, or delete it")
    if not begun and rank == 0:
        text = json.dumps(dataclasses.asdict(args), indent=2) + "\n"
        write_atomically(out / "args.json", lambda path: path.write_text(text))
        (out / "metrics.jsonl").unlink(missing_ok=True)
    model = build_model(args, [clip.text for clip in clips]).place(device)
    model.check([*clips, *valid, *test])
    noise = load_noise(args.noise, args.data) if has_audio else None
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, args.lr, betas=(0.9, 0.98), weight_decay=args.weight_decay, fused=True)
    dataset = ClipDataset(
        clips, load, args.task, train=True, noise=noise, seed=args.seed, clean_epochs=args.clean_epochs
    )
    batches = FrameBatches([c.frames for c in clips], args.max_frames, seed=args.seed, rank=rank, world=world)
    loader = make_loader(dataset, batches, args.workers)

    # Where training stands. Everything that the rest of the run depends on goes into checkpoint.pt with it.
    epoch, done, step, start = 0, 0, 0, time.time()  # done: batches of this epoch
    if begun:
        checkpoint = torch.load(out / "checkpoint.pt", map_location="cpu", weights_only=True)
        if checkpoint["world"] != world:
            sys.exit(
                f"error: {out} was trained with {checkpoint['world']} processes; resume it with as many, not {world}"
            )
        model.load_trained_state(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        epoch, done, step = checkpoint["epoch"], checkpoint["done"], checkpoint["step"]
        start -= checkpoint["seconds"]
        if rank == 0:  # forget what was logged after the checkpoint: it will be logged again
            lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
            write_atomically(out / "metrics.jsonl", lambda path: path.write_text("".join(kept)))

    def save_checkpoint():
        state = {"model": model.trained_state(), "optimizer": optimizer.state_dict()}
        state |= {"epoch": epoch, "done": done, "step": step, "world": world, "seconds": time.time() - start}
        write_atomically(out / "checkpoint.pt", lambda path: torch.save(state, path))

    def log(**values):
        with open(out / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, "epoch": epoch} | values) + "\n")

    signals = []

    def on_signal(number, frame):  # the first one ends the run after a whole step, a second one at once
        signals.append(number)
        signal.signal(number, signal.default_int_handler)

    def stopping():
        """() > 0 where any process has had a signal: all must stop at the same step."""
        count = torch.tensor(float(len(signals)), device=device)
        if world > 1:
            dist.all_reduce(count)
        return count

    wrapped = model
    if world > 1:
        trains_video = "video" in TASKS[args.task] and is_trained(model.video_encoder)
        if trains_video and device.type == "cuda":  # on CPUs torch has none: there each process normalises by itself
            model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        # Without device_ids, which would move the lengths in the batch to the GPU; LayerDrop skips parameters.
        wrapped = DistributedDataParallel(model, find_unused_parameters=trains_video)
    batches_in = []  # each epoch: its shuffle decides how the clips fill the batches
    for epoch_ahead in range(args.epochs):
        batches.epoch = epoch_ahead
        batches_in.append(len(batches))
    steps = sum(math.ceil(n / args.accumulate) for n in batches_in)
    if rank == 0:
        print(f"{len(clips)} clips, {steps} steps; parameters trained, in millions:")
        for name, part in model.named_children():
            trained = sum(p.numel() for p in part.parameters() if p.requires_grad)
            print(f"  {name}: {trained / 1e6:.2f} of {sum(p.numel() for p in part.parameters()) / 1e6:.2f}")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    loads = {}  # {router: the weight that each of its experts has had in this epoch and process (E,)}

    def count_loads(module, inputs, outputs):
        for kind, r in outputs[1].items():
            load = r.weights.new_zeros(r.logits.shape[-1]).scatter_add(
                0, r.experts.flatten(), r.weights.detach().flatten()
            )
            gate = module.smops[kind].gate  # a joint router is one
            loads[gate] = loads.get(gate, 0) + load

    model.projector.register_forward_hook(count_loads)
    bar = tqdm(total=steps, initial=step, unit="step", disable=rank > 0)
    for epoch in range(epoch, args.epochs):
        dataset.epoch = batches.epoch = epoch
        batches.skip = done
        model.train()
        loads.clear()
        ready = began = time.time()
        waited, ids, step_losses = 0, [], {}
        for batch in loader:
            waited += time.time() - ready
            ids += batch["ids"]
            last = done + 1 == batches_in[epoch]
            update = (done + 1) % args.accumulate == 0 or last
            in_step = min(args.accumulate, batches_in[epoch] - done // args.accumulate * args.accumulate)
            if world > 1:
                wrapped.require_backward_grad_sync = update
            # Dropout, too, does not depend on what was before: a resumed run draws the same.
            torch.manual_seed(random.Random(f"{args.seed} {epoch} {done} {rank}").getrandbits(63))
            losses = wrapped(batch, dist.group.WORLD)  # None of a single process
            (losses.total / in_step).backward()
            values = losses._asdict() | {"stop": stopping()}
            if update:
                values["grad_norm"] = torch.nn.utils.clip_grad_norm_(parameters, args.clip_grad)
            values = dict(zip(values, torch.stack(list(values.values())).tolist()))  # one wait for a GPU
            stop = values.pop("stop")
            if not all(map(math.isfinite, values.values())):  # in every process: the losses are over all of them
                clip_ids = ", ".join(gather(ids))
                sys.exit(
                    f"error: a loss or gradient without a finite value ({values}) after {step} steps; the last "
                    f"checkpoint is kept; clips of this step: {clip_ids}"
                )
            step_losses = {name: step_losses.get(name, 0) + values[name] / in_step for name in losses._fields}
            done += 1
            ready = time.time()
            if not update:
                continue
            rate = optimizer.defaults["lr"] * learning_rate(step, steps, args.warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            seconds = time.time() - began
            values |= step_losses | {"lr": rate, "clips_per_s": len(ids) * world / seconds, "waited": waited / seconds}
            ready = began = time.time()
            waited, ids, step_losses = 0, [], {}
            if rank == 0:
                log(**values)
                bar.update()
                bar.set_postfix(
                    loss=f"{values['total']:.3f}", lm=f"{values['lm']:.3f}", balance=f"{values['load_balancing']:.2f}",
                    z=f"{values['router_z']:.2f}", clips_s=f"{values['clips_per_s']:.0f}",
                )  # fmt: skip
                if not last and (stop or args.save_every and step % args.save_every == 0):
                    save_checkpoint()
            if stop and not last:
                if world > 1:  # until the checkpoint is written: torchrun ends all when one ends
                    dist.barrier()
                raise KeyboardInterrupt
        done = 0
        top_k = model.config["top_k"]
        for shares in [sums / sums.sum() for sums in loads.values() if len(sums) > top_k]:
            if rank == 0 and shares.topk(top_k).values.sum() > COLLAPSE_SHARE:
                tqdm.write(
                    f"warning: a router has collapsed, in epoch {epoch} its experts had {shares.tolist()} of its weight; "
                    "raise --load-balancing-weight or lower --lr"
                )
        share_state(model)
        valid_lm = valid_loss(model, valid, load, args, device)
        if rank == 0:
            if args.average > 1 and epoch >= args.epochs - args.average:
                state = model.trained_state()
                write_atomically(out / f"epoch-{epoch}.safetensors", lambda path: save_file(state, path))
            log(valid_lm=valid_lm)
            epoch += 1  # where a resumed run goes on
            save_checkpoint()
        if stopping():
            raise KeyboardInterrupt
    bar.close()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)

    if args.average > 1 and rank == 0:
        epochs = range(args.epochs - args.average, args.epochs)
        states = [load_file(out / f"epoch-{epoch}.safetensors") for epoch in epochs]
        mean = {name: torch.stack([s[name].double() for s in states]).mean(0).to(x) for name, x in states[0].items()}
        model.load_trained_state(mean)
    share_state(model)
    minutes = (time.time() - start) / 60
    if rank == 0:
        model.save(out)
        print(f"trained in {minutes:.1f} minutes; evaluating on the test split")
    model.eval()
    results, hypotheses = evaluate(model, test, load, noise, snrs, args.num_beams, args.max_frames, args.workers)
    about = {"data": args.data, "split": "test", "seed": args.seed, "training_minutes": round(minutes, 1)}
    if rank == 0:
        report(about | results, hypotheses, out)
    if world > 1:
        # First the wrapper: as the group's last owner, it would wait for gloo's threads and hold the GIL they need.
        del wrapped
        dist.destroy_process_group()


def share_state(model):
    """Give all processes what process 0 has trained: on CPUs, BatchNorm's statistics of a step are each one's own."""
    if dist.is_initialized():
        for tensor in model.trained_state().values():
            dist.broadcast(tensor, 0)


@torch.no_grad()
def valid_loss(model, clips, load, args, device):
    """Cross entropy of the transcripts of clean clips: a batch's mean over tokens, weighted by its clips."""
    model.eval()
    batches = own_batches(clips, args.max_frames)
    loader = make_loader(ClipDataset(clips, load, args.task), batches, args.workers)
    total = torch.zeros((), dtype=torch.double, device=device)
    for batch in loader:
        total += model(batch).lm * len(batch["ids"])
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.item() / len(clips)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(fault(error))
