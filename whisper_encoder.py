"""Whisper's encoder (arXiv 2212.04356): 16 kHz sound to features, 50 a second, on transformers' layers.

    encoder = load_whisper("openai/whisper-medium.en")                     # frozen
    mel = log_mel(audio, mel_filters(encoder))                             # (B, S) -> (B, mels, S / 160)
    features = encode(encoder, mel)                                        # 30 s, as Whisper was trained -> (B, 1500, D)
    features = encode(encoder, mel[..., : 2 * T], mask)                    # only the clips; mask (B, T) -> (B, T, D)

Legend: B clips, S samples, T encoder frames (320 samples each), D the encoder's width.
"""

import torch
import torch.nn.functional as F
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from tools.errors import InputError

SAMPLE_RATE = 16_000
FRAME_RATE = 50  # encoder frames a second
SAMPLES_PER_WHISPER_FRAME = SAMPLE_RATE // FRAME_RATE  # 320
MEL_PER_FRAME = 2
MAX_SECONDS = 30  # what Whisper hears
MAX_SAMPLES = MAX_SECONDS * SAMPLE_RATE


def whisper_frames(samples):
    """How many encoder frames are kept of clips of `samples` (B,) samples: 50 a second, at least 25, at most 1500.

    Computed in integers, for each clip. The published code has the same bounds, but takes the longest clip of the batch and
    computes in the default dtype.
    """
    return (samples * FRAME_RATE // SAMPLE_RATE).clamp(25, MAX_SECONDS * FRAME_RATE)


def log_mel(audio, filters):
    """Whisper's log-mel spectrogram: audio (B, S), filters (mels, 201) -> (B, mels, S / 160), on the audio's device.

    As transformers' WhisperFeatureExtractor: power spectrum of 25 ms every 10 ms, log10, at most 8 below its maximum.
    """
    with torch.autocast(audio.device.type, enabled=False):  # bf16 has 8 bits
        window = torch.hann_window(400, device=audio.device)
        power = torch.stft(audio.float(), 400, 160, window=window, return_complex=True)[..., :-1].abs() ** 2
        mel = (filters.float() @ power).clamp(min=1e-10).log10()  # (B, mels, S / 160)
        return (torch.maximum(mel, mel.amax((1, 2), keepdim=True) - 8) + 4) / 4


def encode(encoder, mel, mask=None):
    """transformers' Whisper encoder on any length up to 30 s: mel (B, mels, 2T) -> (B, T, D).

    mask (B, T) bool, True = real, hides padding from the convolutions and as attention keys: a clip's features do not
    depend on what it is batched with. Positions are the first T; without LayerDrop.
    """
    keep = 1 if mask is None else mask.repeat_interleave(MEL_PER_FRAME, 1).unsqueeze(1)  # (B, 1, 2T)
    x = F.gelu(encoder.conv1(mel * keep))  # (B, D, 2T)
    x = F.gelu(encoder.conv2(x)).transpose(1, 2)  # (B, T, D)
    x = F.dropout(x + encoder.embed_positions.weight[: x.shape[1]], encoder.dropout, encoder.training)
    for layer in encoder.layers:
        x = layer(x, None if mask is None else mask[:, None, None, :])
    return encoder.layer_norm(x)


def load_whisper(source):
    """WhisperEncoder: frozen from a hub name or folder, random from a dict of WhisperConfig's arguments."""
    if isinstance(source, dict):
        return WhisperEncoder(make_config(WhisperConfig, source))
    # Of a folder that holds only the encoder, WhisperModel would find no weight under its names and stay random.
    only_encoder = WhisperConfig.from_pretrained(source).architectures == ["WhisperEncoder"]
    model, report = (WhisperEncoder if only_encoder else WhisperModel).from_pretrained(
        source, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
    )
    missing = [name for name in report["missing_keys"] if only_encoder or name.startswith("encoder.")]
    if missing:
        raise InputError(f"{source}: not a Whisper encoder, it lacks {missing[0]} and {len(missing) - 1} more")
    return (model if only_encoder else model.get_encoder()).requires_grad_(False).eval()


def mel_filters(encoder):
    """The filters (mels, 201) of the spectrogram that an encoder takes."""
    filters = WhisperFeatureExtractor(feature_size=encoder.config.num_mel_bins).mel_filters  # (201, mels)
    return torch.from_numpy(filters).float().T.contiguous()


def make_config(cls, settings):
    """A configuration of transformers, which would take a misspelt setting without a word."""
    unknown = settings.keys() - cls().to_dict().keys()
    if unknown:
        raise InputError(f"{cls.__name__} has no {', '.join(sorted(unknown))}")
    return cls(**settings, attn_implementation="sdpa")
