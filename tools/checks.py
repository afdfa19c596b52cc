"""Refuse clips that a model cannot take, before any clip is read."""

import torch

import whisper_encoder
from model import MAX_NEW_TOKENS
from tools.errors import InputError
from tools.media import SAMPLES_PER_FRAME


def tokens_and_faults(encoders, clips):
    """({modality: tokens of each clip}, {what is wrong with their lengths: (B,) bool})."""
    frames = torch.tensor([clip.frames for clip in clips])
    samples = frames * SAMPLES_PER_FRAME
    counts = {m: encoders.tokens_of(m, samples if m == "audio" else frames) for m in encoders.modalities}
    faults = {f"too short for {m} pooling by {encoders.pools[m]}": count < 1 for m, count in counts.items()}
    if "audio" in encoders.modalities:
        faults["longer than Whisper's 30 s"] = samples > whisper_encoder.MAX_SAMPLES
    return counts, faults


def check_lengths(encoders, clips):
    """Raise an InputError that names the clips (20 at most) whose length these encoders cannot take. Reads no clip."""
    refuse(clips, tokens_and_faults(encoders, clips)[1])


def check_clips(model, clips):
    """Raise an InputError that names the clips (20 at most) whose length or transcript this model cannot take. Reads no
    clip."""
    counts, faults = tokens_and_faults(model, clips)
    texts = [clip.text for clip in clips]
    tokens = model.count_tokens(texts)
    most = model.llm.config.max_position_embeddings
    rest = model.token_ids({modality: torch.tensor([0]) for modality in model.modalities})[0].numel()  # markers, prompt
    faults[f"a transcript of more than {MAX_NEW_TOKENS} tokens"] = tokens - 1 > MAX_NEW_TOKENS  # EOS is counted, too
    faults["a transcript that the tokenizer alters, or with a token like </s>"] = find_altered(model.tokenizer, texts)
    faults[f"more tokens than the LLM's {most} positions"] = rest + sum(counts.values()) + tokens > most
    refuse(clips, faults)


def refuse(clips, faults):
    """Raise an InputError that names the clips of each fault, if there are any."""
    found = [f"{clips[i].id}: {fault}" for fault, where in faults.items() for i in where.nonzero().flatten()]
    if found:
        more = f"; and {len(found) - 20} more" if len(found) > 20 else ""
        raise InputError("; ".join(found[:20]) + more)


def find_altered(tokenizer, texts):
    """(B,) bool: which transcripts do not decode to themselves, white space aside, or hold a control token such as </s>.

    Characters that the tokenizer does not know are allowed: valid and test may have them, and there they are errors.
    """

    def encode(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    altered, rows, controls = [], encode(texts), tokenizer.all_special_tokens
    for text, row, back in zip(texts, rows, tokenizer.batch_decode(rows, skip_special_tokens=True)):
        control = any(token in text for token in controls)
        if tokenizer.unk_token_id in row:
            text = "".join(" " if tokenizer.unk_token_id in encode(c) else c for c in text)
            back = tokenizer.decode(encode(text), skip_special_tokens=True)
        altered.append(control or back.split() != text.split())
    return torch.tensor(altered)
