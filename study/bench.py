"""What it costs: the mixture of projectors, more experts, decoding, the paper's sizes.

    python -m study.bench                                       # a few minutes on two CPU cores; on a GPU if there is one
    python -m study.bench --only projector experts --device cpu

What is compared takes turns within one run, and the median counts: machines are noisy, ratios are not. Prints Markdown
tables, writes their numbers to --out (bench.json), and draws experts.png beside it.

Legend: N tokens, E experts, k = top_k, D input width, H hidden width, O output width.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import GenerationConfig

from data import FPS, SAMPLES_PER_FRAME, ClipDataset, collate, load_corpus, make_loader
from eval import load_noise
from model import PROMPTS, LlamaSMoP, add_lora
from smop import SMoP, route
from tools.errors import run_command
from tools.features import Features
from tools.run import join_processes
from tools.tokenizer import train_tokenizer
from train import SMALL_AVHUBERT, SMALL_LLM, SMALL_WHISPER

D, H, O, TOP_K = 1024, 2048, 2048, 2  # the paper's projector for a Llama of width 2048
EXPERTS = [4, 8, 16, 32, 64]
LLAMA = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size".split()
SMOLLM2 = dict(zip(LLAMA, (576, 1536, 30, 9, 3, 49152)), tie_word_embeddings=True)  # SmolLM2-135M's size
LLAMA_1B = dict(zip(LLAMA, (2048, 8192, 16, 32, 8, 128256)), tie_word_embeddings=True)
WHISPER_MEDIUM = {"d_model": 1024, "encoder_layers": 24, "encoder_attention_heads": 16, "encoder_ffn_dim": 4096}


def timed(function, device):
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


def compare(functions, device, seconds=3.0, least=3):
    """{name: median seconds} of functions that take turns for about `seconds`, `least` times or more. With least=1 nothing
    warms up."""
    if least > 1:
        for function in functions.values():  # warm up
            timed(function, device)
    times, start = {name: [] for name in functions}, time.perf_counter()
    while min(map(len, times.values())) < least or time.perf_counter() - start < seconds:
        for name, function in functions.items():
            times[name].append(timed(function, device))
    return {name: statistics.median(t) for name, t in times.items()}


def peak_memory(function):
    """GB on the GPU at the highest point while a function runs, the model included."""
    torch.cuda.reset_peak_memory_stats()
    function()
    return torch.cuda.max_memory_allocated() / 1e9


def table(title, rows):
    """Print rows of equal keys as a Markdown table; returns them."""
    print(f"\n**{title}**\n\n| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
    for row in rows:
        print("|", " | ".join(f"{x:.2f}" if isinstance(x, float) else str(x) for x in row.values()), "|")
    return rows


# --- the projector -----------------------------------------------------------------------------------------------


class Dense(nn.ModuleList):
    """The limit: k dense projectors on every token, the arithmetic of the mixture without its router."""

    def forward(self, x):
        return sum(expert(x) for expert in self)


class GroupedMM(nn.Module):
    """Another way to write the mixture: all experts in one grouped matrix product, which never waits for a GPU."""

    def __init__(self, smop):
        super().__init__()
        self.gate = smop.gate
        first, _, second, norm = zip(*smop.experts)
        self.w1 = nn.Parameter(torch.stack([layer.weight.mT for layer in first]))  # (E, D, H)
        self.w2 = nn.Parameter(torch.stack([layer.weight.mT for layer in second]))  # (E, H, O)
        self.b1, self.b2 = (nn.Parameter(torch.stack([layer.bias for layer in ls])) for ls in (first, second))
        self.scale = nn.Parameter(torch.stack([layer.weight for layer in norm]))  # (E, O)
        self.shift = nn.Parameter(torch.stack([layer.bias for layer in norm]))  # (E, O)

    def forward(self, x):
        routing = route(x, self.gate, TOP_K, renormalize=True)
        order = routing.experts.flatten().argsort(stable=True)  # (N*k,): the (token, expert) pairs, sorted by expert
        expert = routing.experts.flatten()[order]
        ends = F.one_hot(expert, len(self.w1)).sum(0).cumsum(0).to(torch.int32)  # (E,)
        h = F.relu(F.grouped_mm(x[order // TOP_K], self.w1, offs=ends) + self.b1[expert])  # (N*k, H)
        y = F.grouped_mm(h, self.w2, offs=ends) + self.b2[expert]  # (N*k, O)
        y = F.layer_norm(y, y.shape[-1:]) * self.scale[expert] + self.shift[expert]
        y = y[order.argsort()].unflatten(0, routing.experts.shape)  # (N, k, O)
        return (routing.weights.to(x.dtype).unsqueeze(-1) * y).sum(1)


def passes(module, tokens, device, dtype):
    """{"forward": ..., "forward + backward": ...} of a module on random tokens, as functions without arguments."""
    x = torch.randn(tokens, D, device=device, dtype=dtype, requires_grad=True)
    gradient = torch.randn(tokens, O, device=device, dtype=dtype)

    @torch.no_grad()
    def forward():
        module(x)

    def both():
        module.zero_grad()
        y = module(x)
        (y[0] if isinstance(y, tuple) else y).backward(gradient)

    return {"forward": forward, "forward + backward": both}


def bench_projector(device, dtype):
    """The mixture, and another way to write it, against k dense projectors on the same tokens."""
    torch.manual_seed(0)
    smop = SMoP(D, O, H, num_experts=4, top_k=TOP_K).to(device, dtype)
    modules = {"dense": Dense(smop.experts[:TOP_K]), "smop.py": smop}
    if hasattr(F, "grouped_mm"):  # since torch 2.10
        modules["grouped_mm"] = GroupedMM(smop).to(device, dtype)
        x = torch.randn(512, D, device=device, dtype=dtype)
        expected = smop(x)[0]
        assert (modules["grouped_mm"](x) - expected).norm() < 0.01 * expected.norm()
    rows = []
    for tokens in (512, 4096):
        ways = {name: passes(module, tokens, device, dtype) for name, module in modules.items()}
        for direction in ("forward", "forward + backward"):
            times = compare({name: way[direction] for name, way in ways.items()}, device)
            dense = times.pop("dense")
            ratios = {name: seconds / dense for name, seconds in times.items()}
            rows.append({"tokens": tokens, "pass": direction, "dense (ms)": 1e3 * dense} | ratios)
    return table(f"Projector {D}-{H}-{O}, 4 experts, top {TOP_K}: time over that of {TOP_K} dense projectors", rows)


def bench_experts(device, dtype):
    """Time of the mixture against the number of experts; the arithmetic stays the same."""
    smops = {e: SMoP(D, O, H, num_experts=e, top_k=TOP_K).to(device, dtype) for e in EXPERTS}
    rows = []
    for tokens in (512, 4096):
        ways = {e: passes(smop, tokens, device, dtype) for e, smop in smops.items()}
        forward, both = (compare({e: ways[e][d] for e in EXPERTS}, device) for d in ("forward", "forward + backward"))
        for e, smop in smops.items():
            row = {"tokens": tokens, "experts": e, "parameters (M)": sum(p.numel() for p in smop.parameters()) / 1e6}
            row |= {"forward (ms)": 1e3 * forward[e], "forward / 4": forward[e] / forward[4]}
            rows.append(row | {"with backward (ms)": 1e3 * both[e], "with backward / 4": both[e] / both[4]})
    return table(f"Number of experts, top {TOP_K}; / 4: over the time of 4 experts", rows)


def draw_experts(rows, path):
    """Forward time and parameters against the number of experts: the paper's claim at a glance, and where it ends."""
    fig, ax = plt.subplots(figsize=(5, 3.2))
    for tokens in (512, 4096):
        times = [row["forward / 4"] for row in rows if row["tokens"] == tokens]
        ax.plot(EXPERTS, times, "o-", label=f"time, {tokens} tokens")
    parameters = [row["parameters (M)"] / rows[0]["parameters (M)"] for row in rows[: len(EXPERTS)]]
    ax.plot(EXPERTS, parameters, "s:", color="0.5", label="parameters")
    ax.set(xscale="log", yscale="log", xlabel=f"experts, of which {TOP_K} a token", ylabel="times that of 4 experts")
    ax.set(xticks=EXPERTS, xticklabels=EXPERTS, yticks=[1, 2, 4, 8, 16], yticklabels=[1, 2, 4, 8, 16])
    ax.minorticks_off()
    ax.legend(frameon=False)
    fig.savefig(path, dpi=150, bbox_inches="tight")


# --- decoding ----------------------------------------------------------------------------------------------------


def one_by_one(model, items, num_beams, **settings):
    """The published way: a clip at a time, its whole prefix given to every beam."""
    settings |= {"eos_token_id": model.tokenizer.eos_token_id, "pad_token_id": model.tokenizer.pad_token_id}
    config = GenerationConfig(num_beams=num_beams, do_sample=False, **settings)
    ids = []
    for item in items:
        embeddings, mask, _, _ = model.embed(collate([item]))
        ids.append(model.llm.generate(inputs_embeds=embeddings, attention_mask=mask, generation_config=config))
    return torch.cat(ids)


def bench_decoding(device, dtype, length=16):
    """16 clips of the built-in corpus, `length` tokens each, in the published way and in ours."""
    clips, load = load_corpus("synthetic", "test")
    dataset = ClipDataset(clips[:16], load, ("audio", "video"))
    items = [dataset[i] for i in range(16)]
    rows = []
    for name, llm in (("small", SMALL_LLM), ("SmolLM2-135M's size", SMOLLM2)):
        torch.manual_seed(0)
        tokenizer = train_tokenizer([clip.text for clip in clips])
        model = LlamaSMoP("avsr", llm, SMALL_WHISPER, SMALL_AVHUBERT, tokenizer, audio_window="clip")
        model.to(device).eval()
        for beams in (1, 15):
            ids, settings = {}, {"max_new_tokens": length, "min_new_tokens": length}
            ways = {
                "published": lambda: ids.update(published=one_by_one(model, items, beams, **settings)),
                "ours": lambda: ids.update(ours=model.generate_ids(collate(items), beams, **settings)),
            }
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                quick = name == "small" or device.type == "cuda"  # the other takes a minute on a CPU
                times = compare(ways, device, 5, least=3 if quick else 1)
            speeds = {f"{way} (clips/s)": 16 / seconds for way, seconds in times.items()}
            same = int((ids["published"] == ids["ours"]).all(1).sum())
            ratio = times["published"] / times["ours"]
            rows.append({"LLM": name, "beams": beams} | speeds | {"ratio": ratio, "same tokens": f"{same} of 16 clips"})
    return table(f"Decoding 16 clips, {length} tokens each", rows)


# --- features encoded once ---------------------------------------------------------------------------------------


def bench_features(device, folder, clips=24):
    """Training on clips and on their features, loading included, in one process; the LLM is small, from scratch."""
    facts, rows = Features(folder).facts, []
    corpora = {"clips": load_corpus(facts["data"], "train"), "features": load_corpus(folder, "train")}
    noise = load_noise(facts["noise"], facts["data"])
    for task in ("asr", "avsr"):
        tokenizer = train_tokenizer([clip.text for clip in corpora["clips"][0]])
        parts = SMALL_LLM, facts["audio_encoder"], facts["video_encoder"]
        model = LlamaSMoP(
            task, *parts, tokenizer, **{k: facts[k] for k in ("audio_window", "audio_pool", "video_pool")}
        )
        model.to(device)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3, fused=True)

        def train_on(corpus, load):
            dataset = ClipDataset(corpus, load, model.modalities, noise)
            for batch in make_loader(dataset, [[(i, 0) for i in range(j, j + 12)] for j in range(0, clips, 12)], 0):
                model(batch).total.backward()
                optimizer.step()
                optimizer.zero_grad()

        ways = {name: lambda corpus=corpus: train_on(*corpus) for name, corpus in corpora.items()}
        times = compare(ways, device, seconds=20)
        speeds = {f"from {name} (clips/s)": clips / seconds for name, seconds in times.items()}
        rows.append({"task": task} | speeds | {"ratio": times["clips"] / times["features"]})
    return table(f"Training on clips and on their features, of {Path(facts['data']).name}", rows)


# --- the paper's sizes -------------------------------------------------------------------------------------------


def paper_model(device):
    """Random weights of the paper's sizes, frozen as if pretrained; without a GPU, of our small sizes."""
    gpu = device.type == "cuda"
    tokenizer = train_tokenizer([clip.text for clip in load_corpus("synthetic", "train")[0]])
    parts = (LLAMA_1B, WHISPER_MEDIUM, {}) if gpu else (SMALL_LLM, SMALL_WHISPER, SMALL_AVHUBERT)
    model = LlamaSMoP("avsr", *parts, tokenizer, audio_window="30s" if gpu else "clip", prompt=PROMPTS["avsr"])
    model.audio_encoder.requires_grad_(False)
    model.video_encoder.requires_grad_(False)
    model.llm = add_lora(model.llm)
    return model.to(device).train()  # built on the CPU: in float32 it takes more of a GPU than its training does


def bench_paper(device, dtype, seconds=4, frames=1500):
    """Speed and peak memory of training (on clips, on features), encoding and decoding; the hours that one pass over LRS3,
    433 hours, takes."""
    model = paper_model(device)
    clips, length = frames // (FPS * seconds), FPS * seconds
    sound, video = torch.randn(length * SAMPLES_PER_FRAME), torch.randint(256, (length, 88, 88), dtype=torch.uint8)
    item = {"id": "x", "text": "the quick brown fox jumps over the lazy dog", "audio": sound, "video": video}
    batch = collate([item] * clips)
    features, counts = model.encode(batch)
    stored = {"ids": batch["ids"], "texts": batch["texts"]}  # as tools.encode stores it: float16, on the CPU
    stored |= {f"{modality}_features": x.half().cpu() for modality, x in features.items()}
    stored |= {f"{modality}_lengths": count for modality, count in counts.items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-3, fused=True)

    def step(batch):
        model(batch).total.backward()
        optimizer.step()
        optimizer.zero_grad()

    tokens = {"max_new_tokens": 24, "min_new_tokens": 24}
    ways = {
        "training on clips": lambda: step(batch),
        "training on features": lambda: step(stored),
        "encoding": lambda: model.encode(batch),
        "decoding with 15 beams, 24 tokens": lambda: model.generate_ids(batch, 15, **tokens),
    }
    times, rows = compare(ways, device), []
    for name, way in ways.items():
        speed = clips / times[name]
        rows.append({"work": name, "clips/s": speed, "hours for 433 h": 433 / seconds / speed})
        if device.type == "cuda":
            rows[-1]["peak (GB)"] = peak_memory(way)
    sizes = "The paper's sizes" if device.type == "cuda" else "Small sizes in place of the paper's"
    millions = [f"{sum(p.numel() for p in ps) / 1e6:.1f} M" for ps in (model.parameters(), trained)]
    about = f"random weights, {millions[0]} parameters, of which {millions[1]} are trained"
    return table(f"{sizes}, {about}; {clips} clips of {seconds} s a batch", rows)


def main():
    parts = {"projector": bench_projector, "experts": bench_experts, "decoding": bench_decoding, "paper": bench_paper}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", nargs="+", choices=parts, default=list(parts), help="parts to run (default: all)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    add("--features", help="folder of tools/encode.py: training on it is compared with training on its clips")
    add("--out", type=Path, default=Path("bench.json"), help="file to write (default: bench.json)")
    args = parser.parse_args()
    device = join_processes(args.device)[2]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    about = {"device": name, "threads": torch.get_num_threads(), "dtype": str(dtype)}
    about |= {"torch": torch.__version__, "transformers": transformers.__version__}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    results = {"about": about}
    for name in args.only:
        results[name] = parts[name](device, dtype)
        args.out.write_text(json.dumps(results, indent=2) + "\n")
    if args.features:
        results["features"] = bench_features(device, args.features)
        args.out.write_text(json.dumps(results, indent=2) + "\n")
    if "experts" in results:
        draw_experts(results["experts"], args.out.with_name("experts.png"))


if __name__ == "__main__":
    run_command(main)
