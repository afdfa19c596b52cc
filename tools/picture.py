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
def draw_clip(model, clip, item, path, words=()):
    """Write a picture of `clip`, whose `item` is that of a ClipDataset. words: [(start, end, word)] in seconds, if known."""
    batch = collate([item])
    [hypothesis], (_, _, routing) = model.generate(batch), model.project(batch)
    best = {m: r.experts[:, 0].tolist() for m, r in routing.by_modality.items()}  # of the largest weight, per token
    shown = [name for name in ("video", "audio") if name in item] + ["words"] * bool(words)
    heights = [{"video": 1.0, "audio": 1.2, "words": 0.35}[name] for name in shown] + [0.4] * len(best)
    seconds = clip.frames / FPS
    size = (8, 0.9 + sum(heights))
    fig, axes = plt.subplots(
        len(heights), figsize=size, sharex=True, layout="constrained", height_ratios=heights, squeeze=False
    )
    for ax in axes[:, 0]:
        ax.set_yticks([])
        ax.spines[:].set_visible(False)
    for name, ax in zip(shown, axes[:, 0]):
        if name == "video":
            draw_mouths(ax, item["video"].numpy(), seconds)
        elif name == "audio":
            mel = log_mel(item["audio"][None], model.mel_filters.cpu())[0].numpy()
            ax.imshow(mel, origin="lower", aspect="auto", extent=(0, seconds, 0, 1), cmap="magma")
        else:
            for start, end, word in words:
                ax.text((start + end) / 2, 0.4, word, ha="center", va="center", parse_math=False)
                ax.vlines((start, end), 0, 1, color="0.6", linewidth=0.6)
            ax.set(ylim=(0, 1))
    for (modality, experts), ax in zip(best.items(), axes[len(shown) :, 0]):
        step = seconds / len(experts)
        colours = [COLOURS[expert % len(COLOURS)] for expert in experts]
        ax.broken_barh([(t * step, step) for t in range(len(experts))], (0, 1), facecolors=colours)
        ax.set(ylabel=modality, ylim=(0, 1))
    legend = f"seconds; colours: each token's expert of largest weight, of {experts_of(model)}"
    axes[-1, 0].set(xlim=(0, seconds), xlabel=legend)
    texts = f"said: {shorten(clip.text, 90)}\nread: {shorten(hypothesis, 90)}"
    axes[0, 0].set_title(texts, loc="left", fontsize=10, parse_math=False)
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
