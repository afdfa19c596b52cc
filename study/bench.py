"""What it costs: the mixture, more experts, decoding, the paper's sizes, loading.

    python -m study.bench                                       # 4.5 minutes on two CPU cores; on a GPU where there is one
    python -m study.bench --only projector experts --device cpu
    python -m study.bench --data GRID_DIR                       # loading speed of prepared clips, too

What is compared is timed in turns within one run, and the median counts: machines are noisy, ratios are not. Prints
Markdown tables, writes them as numbers to --out (bench.json), and draws experts.png beside it (with matplotlib).

Legend: N tokens, E experts, k = top_k, D input width, H hidden width, O output width.
"""

import argparse
import ctypes
import json
import os
import platform
import statistics
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import GenerationConfig

from data import FPS, ClipDataset, collate, load_corpus
from model import LlamaSMoP, add_lora, train_tokenizer
from smop import SMoP
from train import SMALL_AVHUBERT, SMALL_LLM, SMALL_WHISPER

D, H, O, TOP_K = 1024, 2048, 2048, 2  # the paper's projector for a Llama of width 2048
SMOLLM2 = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip
LLAMA_1B = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True,
}  # fmt: skip
WHISPER_BASE = {"d_model": 512, "encoder_layers": 6, "encoder_attention_heads": 8, "encoder_ffn_dim": 2048}
WHISPER_MEDIUM = {"d_model": 1024, "encoder_layers": 24, "encoder_attention_heads": 16, "encoder_ffn_dim": 4096}


# --- measuring ---------------------------------------------------------------------------------------------------


def timed(function, device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(functions, device, seconds=3.0, least=3):
    """{name: median seconds} of functions that take turns for about `seconds`, `least` times or more."""
    if least > 1:
        for function in functions.values():  # warm up
            timed(function, device)
    times, start = {name: [] for name in functions}, time.perf_counter()
    while min(map(len, times.values())) < least or time.perf_counter() - start < seconds:
        for name, function in functions.items():
            times[name].append(timed(function, device))
    return {name: statistics.median(t) for name, t in times.items()}


def peak_memory(function, device):
    """Bytes at the highest point while a function runs, above what is there before it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    if not os.path.exists("/proc/self/clear_refs"):
        return float("nan")  # not Linux
    ctypes.CDLL(None).malloc_trim(0)  # give back what earlier work has freed
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident("VmRSS")
    function()
    return resident("VmHWM") - before


def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def processor():
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(": ")[1] for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def table(title, rows):
    """Print rows of equal keys as a Markdown table; returns them."""
    show = lambda v: f"{v:.3g}" if isinstance(v, float) and v < 100 else f"{v:.0f}" if isinstance(v, float) else str(v)  # noqa: E731
    print(f"\n**{title}**\n\n| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
    for row in rows:
        print(f"| {' | '.join(show(value) for value in row.values())} |")
    return rows


# --- the projector -----------------------------------------------------------------------------------------------


class WhereLoop(nn.Module):
    """The plain way: for each expert find its tokens, run them, add them in."""

    def __init__(self, smop):
        super().__init__()
        self.smop = smop

    def forward(self, x):
        routing = self.smop.route(x)
        y = x.new_zeros(len(x), self.smop.dim_out)
        for e, expert in enumerate(self.smop.experts):
            token, slot = torch.where(routing.experts == e)
            y = y.index_add(0, token, routing.weights[token, slot, None].to(x.dtype) * expert(x[token]))
        return y


class GroupedMM(nn.Module):
    """All experts' matrices stacked, and torch's grouped matrix product: no loop, and no wait for a GPU."""

    def __init__(self, smop):
        super().__init__()
        self.smop = smop
        stack = lambda i, name: nn.Parameter(torch.stack([getattr(e[i], name).detach() for e in smop.experts]))  # noqa: E731
        self.w1, self.b1 = (
            nn.Parameter(stack(0, "weight").detach().mT.contiguous()),
            stack(0, "bias"),
        )  # (E, D, H), (E, H)
        self.w2, self.b2 = (
            nn.Parameter(stack(2, "weight").detach().mT.contiguous()),
            stack(2, "bias"),
        )  # (E, H, O), (E, O)
        self.scale, self.shift = stack(3, "weight"), stack(3, "bias")  # (E, O)

    def forward(self, x):
        routing = self.smop.route(x)
        order = routing.experts.flatten().argsort(stable=True)  # (N*k,)
        expert = routing.experts.flatten()[order]
        ends = F.one_hot(expert, len(self.w1)).sum(0).cumsum(0).to(torch.int32)
        h = F.relu(F.grouped_mm(x[order // TOP_K], self.w1, offs=ends) + self.b1[expert])  # (N*k, H)
        y = F.grouped_mm(h, self.w2, offs=ends) + self.b2[expert]  # (N*k, O)
        y = F.layer_norm(y, y.shape[-1:]) * self.scale[expert] + self.shift[expert]
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        return (routing.weights.to(x.dtype).unsqueeze(-1) * y[place].unflatten(0, routing.experts.shape)).sum(1)


def forward_and_backward(module, x, gradient):
    """{"forward": ..., "forward+backward": ...} of a module as functions without arguments."""

    def both():
        for p in module.parameters():
            p.grad = None
        y = module(x)
        (y[0] if isinstance(y, tuple) else y).backward(gradient)

    return {"forward": torch.no_grad()(partial(module, x)), "forward+backward": both}


def bench_projector(device, dtype):
    """The mixture, and two other ways to write it, against the limit: k dense projectors on the same tokens."""
    rows = []
    for tokens in (512, 4096):
        torch.manual_seed(0)
        smop = SMoP(D, O, H, num_experts=4, top_k=TOP_K).to(device, dtype)
        x = torch.randn(tokens, D, device=device, dtype=dtype, requires_grad=True)
        gradient = torch.randn(tokens, O, device=device, dtype=dtype)
        dense = SMoP(D, O, H, num_experts=TOP_K, top_k=TOP_K).to(device, dtype).experts
        candidates = {
            "limit": lambda x, dense=dense: sum(mlp(x) for mlp in dense),
            "smop.py": smop,
            "where loop": WhereLoop(smop),
        }
        candidates["limit"].parameters = dense.parameters
        try:
            grouped = GroupedMM(smop).to(device, dtype)
            forward_and_backward(grouped, x, gradient)["forward+backward"]()
            candidates["grouped_mm"] = grouped
        except (AttributeError, NotImplementedError, RuntimeError) as error:
            print(f"no grouped_mm for {dtype} on {device}: {str(error).splitlines()[0]}")
        expected = smop(x)[0]
        for name in candidates.keys() - {"limit", "smop.py"}:  # three ways to write one thing
            assert (candidates[name](x) - expected).norm() < 0.01 * expected.norm(), name
        ways = {name: forward_and_backward(module, x, gradient) for name, module in candidates.items()}
        for direction in ("forward", "forward+backward"):
            times = compare({name: way[direction] for name, way in ways.items()}, device)
            row = {"tokens": tokens, "pass": direction, "limit (ms)": 1e3 * times["limit"]}
            rows.append(
                row
                | {
                    name: times[name] / times["limit"]
                    for name in ("smop.py", "where loop", "grouped_mm")
                    if name in times
                }
            )
    return table(f"Projector {D}-{H}-{O}, 4 experts, top {TOP_K}: time over that of {TOP_K} dense projectors", rows)


def bench_experts(device, dtype):
    """Time and memory of the mixture against the number of experts, arithmetic fixed."""
    rows = []
    copy = torch.ones(2**28 if device.type == "cuda" else 2**26, device=device)
    bandwidth = copy.nbytes / compare({"read": copy.sum}, device, 1)["read"]
    for tokens in (512, 4096):
        gradient = torch.randn(tokens, O, device=device, dtype=dtype)
        x = torch.randn(tokens, D, device=device, dtype=dtype, requires_grad=True)
        smops = {E: SMoP(D, O, H, num_experts=E, top_k=TOP_K).to(device, dtype) for E in (4, 8, 16, 32, 64)}
        ways = {E: forward_and_backward(smop, x, gradient) for E, smop in smops.items()}
        times = {d: compare({E: ways[E][d] for E in ways}, device) for d in ("forward", "forward+backward")}
        for E, smop in smops.items():
            weights = sum(p.nbytes for p in smop.parameters())
            roof = max(times["forward"][4], weights / bandwidth)
            smop.zero_grad(set_to_none=True)
            rows.append({
                "tokens": tokens, "experts": E, "parameters (M)": sum(p.numel() for p in smop.parameters()) / 1e6,
                "forward (ms)": 1e3 * times["forward"][E], "over 4 experts": times["forward"][E] / times["forward"][4],
                "over roofline": times["forward"][E] / roof,
                "forward+backward (ms)": 1e3 * times["forward+backward"][E],
                "over 4": times["forward+backward"][E] / times["forward+backward"][4],
                "peak (MB)": peak_memory(ways[E]["forward+backward"], device) / 1e6,
            })  # fmt: skip
    return table(
        f"Number of experts, top {TOP_K}; roofline: 4 experts' time, or all weights read at {bandwidth / 1e9:.0f} GB/s",
        rows,
    )


def draw_experts(rows, path):
    """Forward time and parameters against the number of experts: the paper's claim at a glance, and where it ends."""
    try:
        import matplotlib
    except ImportError:
        return print("no picture: pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(5, 3.2))
    for tokens, colour in ((512, "C0"), (4096, "C1")):
        own = [row for row in rows if row["tokens"] == tokens]
        ax.plot(
            [r["experts"] for r in own],
            [r["over 4 experts"] for r in own],
            "o-",
            color=colour,
            label=f"time, {tokens} tokens",
        )
    ax.plot(
        [r["experts"] for r in own],
        [r["parameters (M)"] / own[0]["parameters (M)"] for r in own],
        "s:",
        color="0.5",
        label="parameters",
    )
    ax.set(xscale="log", yscale="log", xlabel=f"experts, of which {TOP_K} a token", ylabel="times that of 4 experts")
    ax.set_xticks([4, 8, 16, 32, 64], ["4", "8", "16", "32", "64"])
    ax.set_yticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
    ax.minorticks_off()
    ax.legend(frameon=False)
    fig.savefig(path, dpi=150, bbox_inches="tight")


# --- decoding ----------------------------------------------------------------------------------------------------


def one_by_one(model, items, num_beams, **settings):
    """The published way: a clip at a time, its whole prefix given to every beam."""
    config = GenerationConfig(
        num_beams=num_beams, do_sample=False, eos_token_id=model.tokenizer.eos_token_id,
        pad_token_id=model.tokenizer.pad_token_id, **settings,
    )  # fmt: skip
    ids = []
    for item in items:
        embeddings, mask, _, _ = model.embed(collate([item]))
        ids.append(model.llm.generate(inputs_embeds=embeddings, attention_mask=mask, generation_config=config))
    return torch.cat(ids)


def bench_decoding(device, dtype, length=16):
    """16 clips of the built-in corpus, `length` tokens each, with the published way and with ours."""
    clips, load = load_corpus("synthetic", "test")
    dataset = ClipDataset(clips[:16], load, "avsr")
    items = [dataset[i] for i in range(16)]
    rows = []
    for name, llm in (("small", SMALL_LLM), ("SmolLM2-135M", SMOLLM2)):
        torch.manual_seed(0)
        tokenizer = train_tokenizer([clip.text for clip in clips])
        model = LlamaSMoP("avsr", llm, SMALL_WHISPER, SMALL_AVHUBERT, tokenizer, audio_window="clip")
        model.place(device).eval()
        for beams in (1, 15):
            ids, settings = {}, {"max_new_tokens": length, "min_new_tokens": length}
            ways = {
                "published": lambda: ids.update(published=one_by_one(model, items, beams, **settings)),
                "ours": lambda: ids.update(ours=model.generate_ids(collate(items), beams, **settings)),
            }
            with torch.no_grad(), model.autocast():  # the published way, too
                least = 3 if name == "small" else 1  # the other takes a minute on a CPU
                times = compare(ways, device, 5, least)
            rows.append({
                "LLM": name, "beams": beams, "published (clips/s)": 16 / times["published"], "ours (clips/s)": 16 / times["ours"],
                "ratio": times["published"] / times["ours"],
                "same tokens": f"{int((ids['published'] == ids['ours']).all(1).sum())} of 16 clips",
            })  # fmt: skip
    return table(f"Decoding 16 clips, {length} tokens each", rows)


# --- the paper's sizes -------------------------------------------------------------------------------------------


def paper_model(device, task="avsr"):
    """Random weights of the paper's sizes, frozen as if pretrained; of the small sizes where there is no GPU."""
    full = device.type == "cuda"
    tokenizer = train_tokenizer([clip.text for clip in load_corpus("synthetic", "train")[0]])
    parts = (LLAMA_1B, WHISPER_MEDIUM, {}) if full else (SMALL_LLM, SMALL_WHISPER, SMALL_AVHUBERT)
    with device:
        model = LlamaSMoP(
            task,
            *parts,
            tokenizer,
            audio_window="30s" if full else "clip",
            prompt="Transcribe speech and video to text.",
        )
    model.audio_encoder.requires_grad_(False)
    model.video_encoder.requires_grad_(False)
    model.llm = add_lora(model.llm)
    return model.place(device).train()


def bench_paper(device, dtype, seconds=4.0, frames=1500):
    """Training and decoding speed, memory, and hours for the 433 hours of LRS3, ten epochs."""
    torch.manual_seed(0)
    model = paper_model(device)
    clips = int(frames / FPS / seconds)
    text = "the quick brown fox jumps over the lazy dog and then some"  # about 15 words in 4 s
    item = {
        "id": "x",
        "text": text,
        "audio": torch.randn(int(16000 * seconds)),
        "video": torch.randn(1, int(FPS * seconds), 88, 88),
    }
    batch = collate([item] * clips)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-3, fused=True)

    def step():
        model(batch).total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    weights = sum(p.nbytes for p in model.parameters())
    training = compare({"step": step}, device, 5)["step"]
    states = 2 * sum(p.nbytes for p in trained)
    peak = peak_memory(step, device) + weights + states
    model.eval()
    decode = lambda: model.generate_ids(batch, 15, max_new_tokens=24, min_new_tokens=24)  # noqa: E731
    decoding = compare({"decode": decode}, device, 5)["decode"]
    decoding_peak = peak_memory(decode, device) + weights
    title = f"The paper's sizes, random weights, {clips} clips of {seconds:g} s a batch"
    row = {
        "trained (M)": sum(p.numel() for p in trained) / 1e6,
        "all (M)": sum(p.numel() for p in model.parameters()) / 1e6,
        "training (clips/s)": clips / training,
        "433 h x 10 epochs (h)": 4330 / (clips * seconds / training),
        "weights + states (GB)": (weights + states) / 1e9,
        "training peak (GB)": peak / 1e9,
        "15 beams (clips/s)": clips / decoding,
        "decoding peak (GB)": decoding_peak / 1e9,
    }
    return table(title if device.type == "cuda" else "Small sizes in place of the paper's", [row])


# --- loading -----------------------------------------------------------------------------------------------------


def bench_loading(device, dtype, data):
    """Clips a second of one process: reading and augmenting, of the built-in corpus and of prepared clips."""
    rows = []
    for corpus in filter(None, ("synthetic", data)):
        clips, load = load_corpus(corpus, "train")
        dataset = ClipDataset(clips, load, "avsr", train=True, noise=torch.randn(16000 * 30).numpy())
        few = range(min(20, len(clips)))
        ways = {kind: lambda kind=kind: [load(clips[i], kind) for i in few] for kind in ("audio", "video")}
        times = compare(ways | {"all": lambda: [dataset[i] for i in few]}, device, 4)
        seconds = sum(clips[i].frames for i in few) / FPS / len(few)
        rows.append({"corpus": corpus if corpus == "synthetic" else Path(corpus).name, "s a clip": seconds}
                    | {f"{name} (clips/s)": len(few) / t for name, t in times.items()})  # fmt: skip
    return table("Loading in one process; all: audio, video, noise, masks, transforms", rows)


def bench_window(device, dtype):
    """What Whisper's 30 s window costs for 2 clips of 3 s, with an encoder of Whisper-base's size."""
    tokenizer = train_tokenizer(["a b"])
    items = [{"id": "x", "text": "a", "audio": torch.randn(48000)}] * 2
    models = {
        w: LlamaSMoP("asr", SMALL_LLM, WHISPER_BASE, None, tokenizer, audio_window=w).to(device).eval()
        for w in ("30s", "clip")
    }
    batch = collate(items)
    ways = {w: torch.no_grad()(partial(model.project, batch)) for w, model in models.items()}
    times = compare(ways, device, 4)
    return table(
        "Whisper-base on 2 clips of 3 s",
        [{"window": w, "clips/s": 2 / t, "of 30s": times["30s"] / t} for w, t in times.items()],
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {
        "projector": bench_projector, "experts": bench_experts, "decoding": bench_decoding, "paper": bench_paper,
        "loading": bench_loading, "window": bench_window,
    }  # fmt: skip
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts), help="parts to run (default: all)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.add_argument("--data", help="folder of manifests, for loading")
    parser.add_argument("--out", type=Path, default=Path("bench.json"), help="file to write (default: bench.json)")
    args = parser.parse_args()
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    about = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(), "dtype": str(dtype), "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    results = {"about": about}
    for name in args.only:
        start = time.perf_counter()
        extra = {"data": args.data} if name == "loading" else {}
        results[name] = parts[name](device, dtype, **extra)
        print(f"({name}: {time.perf_counter() - start:.0f} s)")
        args.out.write_text(json.dumps(results, indent=2) + "\n")
    if "experts" in results:
        draw_experts(results["experts"], args.out.with_name("experts.png"))


if __name__ == "__main__":
    main()
