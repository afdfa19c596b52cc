"""One clip and what the routers do with it: mouth, sound and words over the expert that each token weighs most."""

from textwrap import shorten

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from data import FPS, collate
from whisper_encoder import log_mel

COLOURS = ["#264653", "#2a9d8f", "#e9c46a", "#e76f51", "#8d6a9f", "#7f7f7f", "#bcbd22", "#17becf"]


@torch.no_grad()
def draw_clip(model, clip, item, hypothesis, path, words=()):
    """Write a picture of `clip`, whose `item` is that of a ClipDataset. words: [(start, end, word)] in seconds, if known."""
    _, counts, routing = model.project(collate([item]))
    best = {m: r.experts[:, 0].tolist() for m, r in routing.by_modality.items()}  # of the largest weight, per token
    panels = [name for name in ("video", "audio") if name in item] + ["words"] * bool(words) + list(best)
    heights = {"video": 1.0, "audio": 1.2, "words": 0.35}
    rows = [heights[name] if i < len(panels) - len(best) else 0.4 for i, name in enumerate(panels)]
    seconds = clip.frames / FPS
    fig, axes = plt.subplots(
        len(panels), figsize=(8, 0.9 + sum(rows)), sharex=True, layout="constrained", height_ratios=rows, squeeze=False
    )
    for i, (name, ax) in enumerate(zip(panels, axes[:, 0])):
        ax.set_yticks([])
        if i >= len(panels) - len(best):
            step = seconds / len(best[name])
            colours = [COLOURS[expert % len(COLOURS)] for expert in best[name]]
            ax.broken_barh([(t * step, step) for t in range(len(colours))], (0, 1), facecolors=colours)
            ax.set(ylabel=name, ylim=(0, 1))
        elif name == "video":
            draw_mouths(ax, item["video"].numpy(), seconds)
        elif name == "audio":
            mel = log_mel(item["audio"][None], model.mel_filters.cpu())[0].numpy()
            ax.imshow(mel, origin="lower", aspect="auto", extent=(0, seconds, 0, 1), cmap="magma")
        else:
            for start, end, word in words:
                ax.text((start + end) / 2, 0.4, word, ha="center", va="center", parse_math=False)
                ax.vlines((start, end), 0, 1, color="0.6", linewidth=0.6)
            ax.set(ylim=(0, 1))
        ax.spines[:].set_visible(False)
    axes[-1, 0].set(
        xlim=(0, seconds), xlabel=f"seconds; colours: each token's expert of largest weight, of {experts_of(model)}"
    )
    axes[0, 0].set_title(
        f"said: {shorten(clip.text, 90)}\nread: {shorten(hypothesis, 90)}", loc="left", fontsize=10, parse_math=False
    )
    fig.savefig(path, dpi=130)
    plt.close(fig)


def draw_mouths(ax, video, seconds, count=10):
    """`count` frames of video (T, 88, 88), each at its time."""
    width = seconds / count
    for i in range(count):
        frame = video[int((i + 0.5) * len(video) / count)]
        ax.imshow(frame, extent=(i * width, (i + 1) * width, 0, 1), cmap="gray", vmin=0, vmax=255, aspect="auto")


def experts_of(model):
    shared = len(model.projector.experts) < len(model.modalities)
    number = model.config["num_experts"]
    return f"{number}, the same for all modalities" if shared else f"the {number} of its modality"
