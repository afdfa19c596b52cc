"""From clips to what the projector reads: features of Whisper and AV-HuBERT, averaged in time.

    encoders = Encoders("avsr", "openai/whisper-medium.en", "large_vox_iter5.pt").to("cuda")
    features, counts = encoders.encode(batch)         # of data.collate -> {modality: (B, tokens, D)}, {modality: (B,)}

The paper freezes both (but for LoRA in AV-HuBERT for VSR, which is not implemented here), so tools/encode.py can compute
this once for all runs. A batch then holds features in place of sound and video, and `encode` passes them through.

Legend: B clips, S samples, T frames (50 a second of sound, 25 of video), D an encoder's width. A token is the mean of
`pool` frames.
"""

import json
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

import whisper_encoder
from avhubert import FPS, AVHubertEncoder, normalise
from tools.errors import InputError
from whisper_encoder import FRAME_RATE, load_whisper, log_mel, mel_filters, whisper_frames

MODALITIES = {"asr": ("audio",), "vsr": ("video",), "avsr": ("audio", "video")}  # what each task hears and sees
RATES = {"audio": FRAME_RATE, "video": FPS}  # frames a second


class Encoders(nn.Module):
    """Whisper and AV-HuBERT, or only the one that the task needs; the arguments are those of `LlamaSMoP`.

    Padding is masked in encode_audio (samples set to 0), whisper_encoder.encode (with "clip") and AVHubertEncoder.
    """

    def __init__(self, task, audio_encoder, video_encoder, audio_pool=4, video_pool=2, audio_window=None):
        super().__init__()
        audio_window = audio_window or default_window(audio_encoder)
        for name, value, known in (("task", task, MODALITIES), ("audio_window", audio_window, ("30s", "clip"))):
            if value not in known:
                raise InputError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        self.modalities = MODALITIES[task]
        self.pools = {"audio": audio_pool, "video": video_pool}
        self.audio_window = audio_window
        self.widths = {}
        if "audio" in self.modalities:
            self.audio_encoder = load_encoder(audio_encoder, "audio_encoder")
            self.widths["audio"] = self.audio_encoder.config.d_model
            self.register_buffer("mel_filters", mel_filters(self.audio_encoder), persistent=False)
        if "video" in self.modalities:
            self.video_encoder = load_encoder(video_encoder, "video_encoder")
            self.widths["video"] = self.video_encoder.dim

    def encode(self, batch):
        """Features {modality: (B, tokens, D)} of a batch, and how many tokens of each clip are real: {modality: (B,)}."""
        features, counts = {}, self.counts_of(batch)
        with self.autocast():
            for modality in self.modalities:
                if f"{modality}_features" in batch:
                    features[modality] = batch[f"{modality}_features"].to(self.device, non_blocking=True).float()
                    continue
                encode = self.encode_audio if modality == "audio" else self.encode_video
                x = encode(batch).transpose(1, 2)  # (B, D, T)
                features[modality] = F.avg_pool1d(x, self.pools[modality]).transpose(1, 2)  # (B, tokens, D)
        return features, counts

    def counts_of(self, batch):
        """How many tokens each clip has, {modality: (B,) on the CPU}."""
        counts = {}
        for modality in self.modalities:
            lengths = batch[f"{modality}_lengths"].cpu()  # of features: in tokens
            if f"{modality}_features" not in batch:
                lengths = self.tokens_of(modality, lengths)
            if (lengths < 1).any():
                short = [name for name, count in zip(batch["ids"], lengths) if count < 1]
                raise InputError(f"{', '.join(short)}: too short for {modality} pooling by {self.pools[modality]}")
            counts[modality] = lengths
        return counts

    def tokens_of(self, modality, lengths):
        """The number of tokens in `lengths` samples or video frames; the remainder is dropped."""
        return (whisper_frames(lengths) if modality == "audio" else lengths) // self.pools[modality]

    def encode_audio(self, batch):
        """Whisper's features (B, T, D), as long as the longest clip."""
        samples = batch["audio_lengths"].cpu()
        frames = whisper_frames(samples)
        longest, window = int(frames.max()), whisper_encoder.MAX_SAMPLES
        if samples.max() > window:
            raise InputError(f"{batch['ids'][int(samples.argmax())]}: longer than Whisper's 30 s")
        if self.audio_window == "clip":  # a frame more: at its edge, a spectrogram reflects the sound
            window = min((longest + 1) * whisper_encoder.SAMPLES_PER_WHISPER_FRAME, window)
        audio = batch["audio"].to(self.device, non_blocking=True)  # (B, S)
        audio = audio.masked_fill(~self.mask_of(samples, audio.shape[1]), 0)
        mel = log_mel(F.pad(audio, (0, window - audio.shape[1])), self.mel_filters)  # (B, mels, window / 160)
        if self.audio_window == "30s":
            return whisper_encoder.encode(self.audio_encoder, mel)[:, :longest]
        mel = mel[..., : whisper_encoder.MEL_PER_FRAME * longest]
        return whisper_encoder.encode(self.audio_encoder, mel, self.mask_of(frames, longest))

    def encode_video(self, batch):
        """AV-HuBERT's features (B, T, D), cut to whole tokens."""
        frames = batch["video_lengths"].cpu() // self.pools["video"] * self.pools["video"]
        video = batch["video"].to(self.device, non_blocking=True)[:, : int(frames.max())]  # (B, T, 88, 88)
        return self.video_encoder(normalise(video), self.mask_of(frames, video.shape[1]))

    def mask_of(self, lengths, size):
        """(B, size) bool, True for the first `lengths` (B,) of each row."""
        return torch.arange(size, device=self.device) < lengths.to(self.device, non_blocking=True)[:, None]

    # --- devices and modes ---------------------------------------------------------------------------------------

    @property
    def device(self):
        return next(self.parameters()).device

    def autocast(self):
        """bf16 on a GPU. Trained weights stay in float32; the router and the log-mel are computed in float32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def _apply(self, fn, recurse=True):
        """What to(), cuda() and cpu() call. On a GPU frozen matrices are kept in bf16: autocast would cast a billion
        weights again at every use."""

        def move(x):
            moved, frozen = fn(x), isinstance(x, nn.Parameter) and not x.requires_grad and x.ndim > 1
            if frozen and moved.is_cuda:
                return moved.bfloat16()
            return moved.float() if frozen and x.is_cuda else moved  # back from a GPU

        return super()._apply(move, recurse)

    def train(self, mode=True):
        """Like nn.Module.train, but frozen parts stay in eval mode: no dropout, no new BatchNorm statistics."""
        super().train(mode)
        for part in self.children():
            part.train(mode and is_trained(part))
        return self


def is_trained(module):
    """Whether any of a module's parameters is trained."""
    return any(p.requires_grad for p in module.parameters())


def read_run_config(source):
    """The config.json of a run folder, or {}."""
    if not isinstance(source, (str, Path)) or not (file := Path(source) / "config.json").is_file():
        return {}
    config = json.loads(file.read_text())
    return config if "task" in config else {}


def default_window(audio_encoder):
    """How much Whisper hears: 30 s if pretrained, the clip if trained from scratch; a run's encoder, as in its training."""
    return read_run_config(audio_encoder).get("audio_window") or ("clip" if isinstance(audio_encoder, dict) else "30s")


def load_encoder(source, part):
    """The "audio_encoder" (Whisper) or "video_encoder" (AV-HuBERT). A dict gives a random one, to be trained; the hub, a
    file or the folder of a run gives a frozen one."""
    if source is None:
        raise InputError(f"{part}: a checkpoint, a run folder or a configuration is needed")
    if config := read_run_config(source):
        return load_from_run(Path(source), config, part)
    if part == "audio_encoder":
        try:
            return load_whisper(source)
        except OSError as error:
            raise InputError(f"audio_encoder: {error}") from None
    if not isinstance(source, dict):
        if os.path.isdir(source):
            raise InputError(f"{source}: not the folder of a finished run; expected one, or an AV-HuBERT file")
        return AVHubertEncoder.from_fairseq(source)
    try:
        return AVHubertEncoder(**source)
    except TypeError as error:
        raise InputError(f"video_encoder: {error}") from None


def load_from_run(folder, config, part):
    """An encoder of a finished run of train.py or tools/lips.py, frozen."""
    if part.removesuffix("_encoder") not in MODALITIES[config["task"]]:
        raise InputError(f"{folder}: a run of the task {config['task']} has no {part.replace('_', ' ')}")
    if not (folder / "model.safetensors").is_file():
        raise InputError(f"{folder}: no model.safetensors; expected the folder of a finished run")
    encoder = load_encoder(config[part], part)
    try:
        state = load_file(folder / "model.safetensors")
    except SafetensorError as error:
        raise InputError(f"{folder / 'model.safetensors'}: {error}") from None
    state = {name.removeprefix(f"{part}."): x for name, x in state.items() if name.startswith(f"{part}.")}
    own, trained = encoder.state_dict(), {name for name, p in encoder.named_parameters() if p.requires_grad}
    shapes = {name: x.shape for name, x in state.items()}
    if not trained <= shapes.keys() <= own.keys() or any(own[name].shape != shape for name, shape in shapes.items()):
        raise InputError(f"{folder / 'model.safetensors'}: not the {part} of its config.json")
    encoder.load_state_dict(state, strict=False)  # what the run did not train is not in it
    return encoder.requires_grad_(False).eval()
