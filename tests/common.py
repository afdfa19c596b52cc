"""What several test files share: commands, tiny models and clips, parts on disk as the hub has them, the authors' tiny
checkpoint."""

import json
import os
import subprocess
import sys
import zlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import ByteLevelBPETokenizer, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, WhisperConfig, WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)  # fmt: skip

from encoders import MODALITIES
from model import LlamaSMoP
from tools.prepare import write_video
from tools.tokenizer import train_tokenizer

torch.set_num_threads(1)  # sums depend on the number of threads
ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
GOLDEN = SHARED / "golden"  # all numbers made with the authors' code; those in tests/golden are enough for most tests
COMPACT = ROOT / "tests" / "golden" / "compact.npz"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs {SHARED}, which is not part of the repository")
needs_faces = pytest.mark.skipif(
    not SHARED.is_dir() or find_spec("dlib") is None, reason=f"needs {SHARED} and dlib (requirements-extra.txt)"
)

ENV = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
LIMIT = 600  # seconds that a command may take: one that hangs must not hold up the other tests
LLM = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
LLM |= {"initializer_range": 0.5}
WHISPER = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64}
AVHUBERT = {"dim": 32, "layers": 1, "heads": 2, "stem_width": 8, "stem_stride": 4, "trunk_widths": [8, 8, 8, 8]}
PROJECTORS = ["MLP", "JEJR", "JEDR", "DEDR"]
WORDS = ["<unk>", "<s>", "</s>", "lay", "blue", "at", "a", "now"]


def close(a, b, rtol=1e-5, atol=1e-5):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=rtol, atol=atol)


# --- commands ----------------------------------------------------------------------------------------------------


def run(*command, code=0):
    """Run one of our scripts as a user does; returns what it printed."""
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, cwd=ROOT, env=ENV, text=True, capture_output=True, timeout=LIMIT)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def command(module, *words):
    """Run the main() of a module with this command line, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module.__name__, *map(str, words)])
        module.main()


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --- tiny and random ---------------------------------------------------------------------------------------------


def small_model(task="avsr", projector="DEDR", **changes):
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["lay blue at a one now", "set red by b two soon"], vocab_size=60)
    settings = {"audio_window": "clip"} | changes
    model = LlamaSMoP(task, LLM, WHISPER | {"init_std": 0.2}, AVHUBERT, tokenizer, projector=projector, **settings)
    for name, buffer in model.named_buffers():  # random statistics of BatchNorm, so that differences would show
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    return model


def small_batch(task="avsr", seconds=(0.8, 1.56, 0.28), texts=("lay blue", "set red by b", "now")):
    """A list of random clips, as ClipDataset gives them, for `collate`."""
    items = []
    for i, (length, text) in enumerate(zip(seconds, texts)):
        g, frames = torch.Generator().manual_seed(i), round(length * 25)
        item = {"audio": torch.randn(frames * 640, generator=g)}
        item["video"] = torch.randint(256, (frames, 88, 88), generator=g, dtype=torch.uint8)
        items.append({"id": str(i), "text": text} | {modality: item[modality] for modality in MODALITIES[task]})
    return items


def write_picture(path, seconds, size=96):
    """A video of a square that brightens."""
    level = np.linspace(40, 200, round(25 * seconds)).astype(np.uint8)
    write_video(path, np.broadcast_to(level[:, None, None], (len(level), size, size)))
    return path


# --- parts as the hub has them -----------------------------------------------------------------------------------


def write_tokenizer(folder, words=WORDS, **special):
    """A tokenizer of transformers whose tokens are `words`, numbered as listed; the first stands for all others."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = special or {"bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def byte_level_tokenizer(folder):
    """As Llama-3 and SmolLM2: byte-level BPE which, asked for special tokens, puts BOS first."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(["lay blue at a one now"], 280, special_tokens=["<|begin|>", "<|end|>"])
    tokenizer.post_processor = processors.TemplateProcessing("<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    special = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    tokenizer.save_pretrained(folder)
    return tokenizer


def write_whisper(folder, **settings):
    """A whole Whisper, decoder included."""
    sizes = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32, "init_std": 0.2}
    whisper = WhisperForConditionalGeneration(WhisperConfig(**WHISPER | sizes | settings)).eval()
    whisper.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=whisper.config.num_mel_bins).save_pretrained(folder)
    return whisper


def write_llama(folder, **settings):
    """A causal LM with a row for each of WORDS."""
    llm = LlamaForCausalLM(LlamaConfig(**LLM | {"vocab_size": len(WORDS)} | settings))
    llm.save_pretrained(folder)
    return llm


# --- the authors' tiny checkpoint --------------------------------------------------------------------------------


def write_published(folder):
    """The model that the numbers of the authors' code are of, as their users have it: llm/, whisper/, avhubert.pt and
    model.pth with all of it. Weights follow from a seed, see ../shared/golden/README.md."""
    golden = np.load(COMPACT)
    info = json.loads(str(golden["model.info_json"]))
    weights = seeded_weights(golden["model.shapes_json"], golden["model.seed"])
    whisper = write_whisper(folder / "whisper", **info["whisper"])
    encoder = whisper.get_encoder()
    weights["audio_encoder.embed_positions.weight"] = encoder.embed_positions.weight.detach().clone()  # sinusoids
    encoder.load_state_dict({name: weights[f"audio_encoder.{name}"] for name in encoder.state_dict()})
    whisper.save_pretrained(folder / "whisper")
    video = seeded_weights(golden["avhubert.shapes_json"], golden["avhubert.seed"])
    prefix = "avhubert.bn."
    video |= {n.removeprefix(prefix): torch.from_numpy(golden[n]) for n in golden.files if n.startswith(prefix)}
    sizes = {"encoder_embed_dim": 64, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_embed_dim": 128}
    sizes |= {"layer_norm_first": True, "conv_pos": 128, "conv_pos_groups": 16}
    sizes |= {"modality_fuse": "concat", "resnet_relu_type": "prelu"}
    torch.save({"cfg": {"model": sizes}, "model": video}, folder / "avhubert.pt")
    torch.save(weights | {f"video_encoder.{name}": x for name, x in video.items()}, folder / "model.pth")

    bos, eos = list(info["token_ids"])[:2]
    write_tokenizer(folder / "llm", [f"w{i}" for i in range(62)] + [bos, eos], bos_token=bos, eos_token=eos)
    llm = write_llama(folder / "llm", **info["llama"] | {"vocab_size": 64, "pad_token_id": None})
    shapes = llm.state_dict().items()  # without the rows of the 5 tokens that the model adds
    llm.load_state_dict({name: weights[f"llm.{name}"][: len(x)] for name, x in shapes})
    llm.save_pretrained(folder / "llm")


def seeded_weights(shapes, seed):
    return {name: seeded_weight(name, shape, int(seed)) for name, shape in json.loads(str(shapes)).items()}


def seeded_weight(name, shape, seed):
    g = np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode())]))
    last = name.rpartition(".")[2]
    if last == "num_batches_tracked":
        return torch.tensor(1000)
    if last == "weight_g":
        x = 0.7 * g.uniform(0.5, 1.5, shape)
    elif last in ("mask_emb", "label_embs_concat"):
        x = g.uniform(0, 1, shape)
    elif last.endswith("bias"):
        x = 0.1 * g.standard_normal(shape)
    elif len(shape) == 1:
        prelu = any(part in name for part in (".relu1.", ".relu2.", "frontend3D.2.weight"))
        x = g.uniform(*((0.05, 0.45) if prelu else (0.5, 1.5)), shape)
    else:
        gain = 2**0.5 if len(shape) >= 4 and last != "weight_v" else 1
        x = gain * g.standard_normal(shape) / np.prod(shape[1:]) ** 0.5
    return torch.from_numpy(x.astype(np.float32))
