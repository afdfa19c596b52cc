"""The machinery of a run: its folder, lock, checkpoints and log; signals; several processes.

A run folder holds args.json (what it was asked for), the tokenizer, checkpoint.pt (where it stands), metrics.jsonl (one
line per step and per epoch) and epoch-N.safetensors (weights to average). `lock` is held while a process works on it. When
training ends, `LlamaSMoP.save`, eval.py and train.py (clip.png) add theirs.
"""

import errno
import json
import os
import random
import signal
import time
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel

from tools.errors import InputError

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two runs out of one folder
    fcntl = None


class RunFolder:
    """The folder of one run. Only process 0 of several writes to it."""

    def __init__(self, folder, rank=0):
        self.path, self.writes = Path(folder), rank == 0
        self.checkpoint = self.path / "checkpoint.pt"
        self.metrics = self.path / "metrics.jsonl"
        self.start = time.time()
        self.facts = {}  # what must be the same when the run continues

    def begin(self, args, resume=False, overwrite=False):
        """Lock the folder and write `args`, a dict, to args.json; or an InputError says why this run may not continue.

        All processes wait until process 0 has done so.
        """
        if self.writes:
            self._begin(args, resume, overwrite)
        wait()

    def _begin(self, args, resume, overwrite):
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock = hold(self.path)  # until this process ends
        if overwrite:
            names = "results.json times.json hypotheses.jsonl clip.png config.json model.safetensors".split()
            for file in (self.checkpoint, self.metrics, *(self.path / x for x in names), *self.path.glob("epoch-*")):
                file.unlink(missing_ok=True)
        if (self.path / "results.json").exists():
            raise InputError(
                f"{self.path}: a finished run; --overwrite deletes it and starts anew, as does another --out"
            )
        if self.checkpoint.exists() and not resume:
            old = json.loads((self.path / "args.json").read_text())
            other = [
                f"{name} {old.get(name)}, now {args.get(name)}"
                for name in old | args
                if name not in ("out", "workers", "device") and old.get(name) != args.get(name)
            ]
            if other:
                raise InputError(
                    f"{self.path}: an interrupted run with other arguments ({'; '.join(other)}); repeat them to continue, or "
                    "--overwrite deletes it and starts anew"
                )
        text = json.dumps(args, indent=2) + "\n"
        write_atomically(self.path / "args.json", lambda path: path.write_text(text))
        if not self.checkpoint.exists():
            self.metrics.unlink(missing_ok=True)

    def save(self, model, optimizer, step):
        """Write a checkpoint after `step` steps. All processes wait for it: torchrun ends all when one ends."""
        if self.writes:
            state = {"model": model.trained_state(), "optimizer": optimizer.state_dict(), "facts": self.facts}
            state |= {"step": step, "seconds": time.time() - self.start}
            write_atomically(self.checkpoint, lambda path: torch.save(state, path))
        wait()

    def restore(self, model, optimizer):
        """Load the checkpoint into model and optimizer; return the number of steps done, 0 without a checkpoint.

        Later lines of the log are dropped, because those steps run again.
        """
        if not self.checkpoint.exists():
            return 0
        state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        for name, value in self.facts.items():
            if state["facts"][name] != value:
                raise InputError(f"{self.path}: begun with {name} {state['facts'][name]}, which is now {value}")
        model.load_trained_state(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        self.start = time.time() - state["seconds"]
        if self.writes:
            lines = self.metrics.read_text().splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= state["step"]]
            write_atomically(self.metrics, lambda path: path.write_text("".join(kept)))
        return state["step"]

    def minutes(self):
        """Minutes spent on this run so far, over all its parts."""
        return (time.time() - self.start) / 60

    def log(self, **values):
        if not self.writes:
            return
        with open(self.metrics, "a") as file:
            file.write(json.dumps(values) + "\n")

    def keep_epoch(self, model, epoch):
        if self.writes:
            state = model.trained_state()
            write_atomically(self.path / f"epoch-{epoch}.safetensors", lambda path: save_file(state, path))

    def average(self, epochs):
        """The mean of the kept weights of several epochs."""
        states = [load_file(self.path / f"epoch-{epoch}.safetensors") for epoch in epochs]
        return {name: torch.stack([s[name].double() for s in states]).mean(0).to(x) for name, x in states[0].items()}


def hold(folder):
    """Lock a folder until the returned file is closed, at the latest when the process ends, however it ends."""
    file = open(folder / "lock", "w")
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which the workers of a killed run would hold
    except OSError as error:
        held = error.errno in (errno.EAGAIN, errno.EACCES)
        why = "another process writes this folder" if held else f"cannot be locked ({error.strerror})"
        raise InputError(f"{folder}: {why}") from None
    return file


def write_atomically(path, write):
    """write(partial path), then rename: whoever reads `path` finds a whole file, whenever the program is killed. Where
    it cannot be written, an InputError says why and the file that was there stays."""
    partial = Path(f"{path}.partial")
    try:
        write(partial)
        os.replace(partial, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors raise their own, without a number
        partial.unlink(missing_ok=True)
        full = getattr(error, "errno", None) in (None, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        kept = "; the previous one is kept" if Path(path).exists() else ""
        raise InputError(f"{path}: could not be written{', is the disk full?' * full} ({error}){kept}") from None


def fingerprint(clips):
    """A checksum of the clips of a corpus: what a run that continues must find again."""
    return zlib.crc32(repr([(clip.id, clip.frames, clip.text) for clip in clips]).encode())


class Signals:
    """The first SIGINT or SIGTERM is counted, so that the run ends after a whole step; a second one ends it at once."""

    def __init__(self):
        self.count = 0

    def __enter__(self):
        self.set(self.note)
        return self

    def __exit__(self, error, *_):
        self.set(signal.default_int_handler)
        if self.count and error is None:  # it came after the last step
            raise KeyboardInterrupt

    def set(self, handler):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, handler)

    def seen(self):
        return torch.tensor(float(self.count))

    def note(self, number, frame):
        self.count += 1
        signal.signal(number, signal.default_int_handler)


# --- several processes -------------------------------------------------------------------------------------------


def join_processes(device):
    """(rank, number of processes, device) of this process of torchrun, or of the only one."""
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"--device {device}: {str(error).splitlines()[0]}") from None
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    needed = max(int(os.environ.get("LOCAL_WORLD_SIZE", 1)), (device.index or 0) + 1)
    if device.type == "cuda" and (gpus := torch.cuda.device_count()) < needed:
        raise InputError(f"--device {device}: {needed} GPUs are needed, but there are {gpus}")
    if world > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        # gloo for `gather` and `wait`: NCCL would send the gathered lists through the GPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return rank, world, device


def rank_and_world():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def wait():
    """Until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


def leave_processes():
    if dist.is_initialized():
        dist.destroy_process_group()


def distribute(model, unused=False):
    """The model under DistributedDataParallel where there are several processes. unused: some steps skip parameters."""
    if not dist.is_initialized():
        return model
    if model.device.type == "cuda":  # BatchNorm over all processes; on CPUs, torch has none
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return DistributedDataParallel(model, find_unused_parameters=unused)


def gather(values):
    """The lists of all processes as one list, in each of them."""
    if not dist.is_initialized():
        return values
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, values)
    return [value for values in lists for value in values]


def seed_step(seed, step, batch):
    """Seed dropout by step and process: a run that continues draws the same, and each process draws its own."""
    torch.manual_seed(random.Random(f"{seed} {step} {batch} {rank_and_world()[0]}").getrandbits(63))


def mean_over_processes(values):
    """{name: float}, the means over all processes of {name: scalar tensor}. Waits once for a GPU."""
    device = next(iter(values.values())).device
    stacked = torch.stack([x.detach().float().to(device, non_blocking=True) for x in values.values()])
    if dist.is_initialized():
        dist.all_reduce(stacked)
        stacked = stacked / dist.get_world_size()
    return dict(zip(values, stacked.tolist()))


def share_state(model):
    """Give all processes what process 0 has trained: on CPUs, BatchNorm's statistics differ after the last step."""
    if dist.is_initialized():
        for tensor in model.trained_state().values():
            dist.broadcast(tensor, 0)
