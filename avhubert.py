"""The visual half of AV-HuBERT (arXiv 2201.02184) on transformers' HuBERT layers, without fairseq.

    encoder = AVHubertEncoder.from_fairseq("large_vox_iter5.pt")      # frozen, Base or Large, as the file says
    features = encoder(video, mask)                                   # (B, 1, T, 88, 88) -> (B, T, D)
    encoder = AVHubertEncoder(dim=128, layers=2, heads=4, stem_width=8, trunk_widths=(8, 16, 32, 64))  # small, random

A ResNet-18 with a 3-D stem turns each frame into a vector. AV-HuBERT puts a vector of the sound before it; here that half
is zero. A Transformer reads both. Agrees with `facebookresearch/av_hubert`, see the tests.

Legend: B clips, T frames (25 a second), N real frames of the batch, C channels, D = dim.
"""

import os
import zipfile

import torch
import torch.nn.functional as F
from torch import nn
from transformers import HubertConfig
from transformers.models.hubert.modeling_hubert import HubertEncoder, HubertEncoderStableLayerNorm

from tools.errors import InputError

FPS = 25
GREY_MEAN, GREY_STD = 0.421, 0.165  # of AV-HuBERT's training data


def normalise(frames):
    """Grey frames of 0 to 255, (B, T, 88, 88) -> what AV-HuBERT takes, (B, 1, T, 88, 88) float32."""
    x = frames.to(torch.float32, copy=True)  # in place from here on: a batch is large
    return x.div_(255).sub_(GREY_MEAN).div_(GREY_STD).unsqueeze(1)


class BasicBlock(nn.Module):
    """ResNet's two 3x3 convolutions around a shortcut, with one learned PReLU slope per channel."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.relu1 = nn.PReLU(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.relu2 = nn.PReLU(c_out)
        self.downsample = None
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(x)) + shortcut)


class LipResNet(nn.Module):
    """3-D convolution over 5 frames, then a 2-D ResNet-18 on each frame: (B, 1, T, 88, 88) -> (B, T, trunk_widths[-1])."""

    def __init__(self, stem_width, trunk_widths, stem_stride=2):
        super().__init__()
        self.frontend3D = nn.Sequential(
            nn.Conv3d(1, stem_width, (5, 7, 7), (1, stem_stride, stem_stride), (2, 3, 3), bias=False),
            nn.BatchNorm3d(stem_width),
            nn.PReLU(stem_width),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
        )
        widths = [stem_width, *trunk_widths]
        self.trunk = nn.Sequential()
        for i, (c_in, c_out) in enumerate(zip(widths, trunk_widths), start=1):
            blocks = nn.Sequential(BasicBlock(c_in, c_out, 1 if i == 1 else 2), BasicBlock(c_out, c_out, 1))
            self.trunk.add_module(f"layer{i}", blocks)

    def forward(self, video, mask):
        """mask (B, T) bool, True = a real frame. Only real frames pass, so padding cannot enter BatchNorm's statistics."""
        x = self.frontend3D[0](video.masked_fill(~mask[:, None, :, None, None], 0))  # (B, C, T, 44, 44)
        real = torch.where(mask)  # indices: with a mask, the CPU waits for a GPU at each use
        x = x.transpose(1, 2)[real]  # (N, C, 44, 44)
        x = self.frontend3D[1:](x.transpose(0, 1).unsqueeze(0))  # (1, C, N, 22, 22): frames as one long clip
        x = x.squeeze(0).transpose(0, 1).contiguous(memory_format=torch.channels_last)  # for speed
        x = self.trunk(x).mean((2, 3))  # (N, C)
        features = x.new_zeros(*mask.shape, x.shape[-1])
        features[real] = x
        return features  # (B, T, C)


class AVHubertEncoder(nn.Module):
    """Lip frames to features at 25 a second: (B, 1, T, 88, 88) -> (B, T, dim).

    dim, layers, heads, ffn_dim: of the Transformer (Base 768, 12, 12, 3072; Large 1024, 24, 16, 4096).
    layer_norm_first: LayerNorm before each block and once at the end, or after each block and once at the start.
    stem_width, stem_stride, trunk_widths: of the ResNet, which has as many stages as widths; small ones train on a CPU.
        At least 8 channels: with fewer, oneDNN writes past its memory on CPUs without AVX-512 (oneDNN issue 6035).
    conv_pos, conv_pos_groups: kernel and groups of the positional convolution.
    dropout: of the Transformer's activations and attention, and of its whole layers (LayerDrop).
    Frozen (no parameter requires a gradient) means eval mode, BatchNorm included, whatever `train()` says.
    """

    def __init__(
        self,
        dim=1024,
        layers=24,
        heads=16,
        ffn_dim=None,
        layer_norm_first=True,
        stem_width=64,
        stem_stride=2,
        trunk_widths=(64, 128, 256, 512),
        conv_pos=128,
        conv_pos_groups=16,
        dropout=0.0,
    ):
        super().__init__()
        if min(stem_width, *trunk_widths) < 8:
            raise InputError(f"stem_width and trunk_widths must be at least 8, got {stem_width} and {trunk_widths}")
        self.dim = dim
        config = HubertConfig(
            hidden_size=dim,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * dim if ffn_dim is None else ffn_dim,
            num_conv_pos_embeddings=conv_pos,
            num_conv_pos_embedding_groups=conv_pos_groups,
            hidden_dropout=dropout,
            attention_dropout=dropout,
            activation_dropout=dropout,
            layerdrop=dropout,
            layer_norm_eps=1e-5,
            attn_implementation="sdpa",
        )
        self.resnet = LipResNet(stem_width, trunk_widths, stem_stride)
        self.proj = nn.Linear(trunk_widths[-1], dim)
        self.layer_norm = nn.LayerNorm(2 * dim)
        self.post_extract_proj = nn.Linear(2 * dim, dim)
        self.encoder = (HubertEncoderStableLayerNorm if layer_norm_first else HubertEncoder)(config)

    def forward(self, video, mask=None):
        """video (B, 1, T, 88, 88), normalised; mask (B, T) bool, True = a real frame. Returns (B, T, dim).

        With a mask, a clip's features do not depend on what it is batched with. Rows at padded frames mean nothing.
        """
        if video.ndim != 5 or video.shape[1] != 1:
            raise ValueError(f"video must be (B, 1, T, 88, 88), got {tuple(video.shape)}")
        if mask is None:
            mask = torch.ones(video.shape[0], video.shape[2], dtype=torch.bool, device=video.device)
        x = self.proj(self.resnet(video, mask))  # (B, T, D)
        x = self.layer_norm(F.pad(x, (self.dim, 0)))  # (B, T, 2D): the audio half comes first, and there is none
        x = self.post_extract_proj(x)  # (B, T, D)
        return self.encoder(x, attention_mask=mask).last_hidden_state

    def train(self, mode=True):
        return super().train(mode and any(p.requires_grad for p in self.parameters()))

    @classmethod
    def from_fairseq(cls, path):
        """A frozen encoder from a published AV-HuBERT checkpoint. Nothing in the file is executed."""
        checkpoint = load_inert(path)
        try:
            cfg, weights = checkpoint["cfg"]["model"], checkpoint["model"]
            sizes = {
                "dim": cfg["encoder_embed_dim"],
                "layers": cfg["encoder_layers"],
                "heads": cfg["encoder_attention_heads"],
                "ffn_dim": cfg["encoder_ffn_embed_dim"],
                "layer_norm_first": cfg["layer_norm_first"],
                "conv_pos": cfg["conv_pos"],
                "conv_pos_groups": cfg["conv_pos_groups"],
            }
            if (cfg["modality_fuse"], cfg["resnet_relu_type"]) != ("concat", "prelu"):
                raise InputError(f"{path}: only modality_fuse=concat with resnet_relu_type=prelu is supported")
        except (KeyError, TypeError) as error:
            raise InputError(f"{path}: not a pretrained AV-HuBERT checkpoint of fairseq (no {error})") from None
        encoder = cls(**sizes)
        missing, unexpected = encoder.load_state_dict(ours_from_fairseq(weights), strict=False)
        if missing or unexpected:
            raise InputError(f"{path}: missing weights {missing}, unknown weights {unexpected}")
        return encoder.requires_grad_(False).eval()


def ours_from_fairseq(weights):
    """fairseq's names -> ours. Left out: the audio half (its input is 0 here) and the heads of pretraining."""
    unused = ("mask_emb", "label_embs_concat", "feature_extractor_audio.", "final_proj.")
    substitutions = {
        "feature_extractor_video.": "",
        "encoder.pos_conv.0.weight_g": "encoder.pos_conv_embed.conv.parametrizations.weight.original0",
        "encoder.pos_conv.0.weight_v": "encoder.pos_conv_embed.conv.parametrizations.weight.original1",
        "encoder.pos_conv.0.bias": "encoder.pos_conv_embed.conv.bias",
        ".self_attn_layer_norm.": ".layer_norm.",
        ".self_attn.": ".attention.",
        ".fc1.": ".feed_forward.intermediate_dense.",
        ".fc2.": ".feed_forward.output_dense.",
    }
    renamed = {}
    for name, value in weights.items():
        if not name.startswith(unused):
            for old, new in substitutions.items():
                name = name.replace(old, new)
            renamed[name] = value
    return renamed


class _Inert(dict):
    """Takes the place of a class that is not installed; swallows its arguments."""

    def __init__(self, *args, **kwargs):
        super().__init__()

    def __setstate__(self, state):
        pass


# Packages of the training code whose objects (dictionaries, settings) a checkpoint may hold beside the weights.
FOREIGN = ("fairseq", "omegaconf", "argparse", "numpy", "typing", "enum", "av_hubert", "avhubert")


def load_inert(path):
    """torch.load of somebody else's checkpoint on the CPU, without running anything in it.

    torch's weights-only reader builds tensors and plain containers. Objects of the packages in FOREIGN become empty
    stand-ins. A file that names anything else is refused. So is one that unpacks to more than its own size, since torch
    does not compress.
    """
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such checkpoint")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            unpacked = sum(entry.file_size for entry in file.infolist())
        if unpacked > os.path.getsize(path):
            raise InputError(f"{path}: refused, {unpacked} bytes are packed into {os.path.getsize(path)}")
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{path}: not a PyTorch checkpoint ({error})") from None
    refused = [name for name in names if name.partition(".")[0] not in FOREIGN]
    if refused:
        raise InputError(f"{path}: refused, since loading it would call {', '.join(refused)}")
    stand_ins = [(type(name.rpartition(".")[2], (_Inert,), {}), name) for name in names]
    with torch.serialization.safe_globals(stand_ins):
        return torch.load(path, map_location="cpu", weights_only=True)
