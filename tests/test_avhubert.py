"""avhubert.py: padding changes nothing, frozen means frozen, and a stranger's checkpoint runs no code.

That its features are those of the authors' code is in test_parity.py.
"""

import sys
import zipfile

import pytest
import torch
import torch.nn.functional as F
from common import AVHUBERT, close

from avhubert import AVHubertEncoder, load_inert, normalise
from tools.errors import InputError


def random_video(frames, clips=1):
    return normalise(torch.randint(256, (clips, frames, 88, 88), dtype=torch.uint8))


# --- the encoder -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer_norm_first", [True, False])
def test_padding_changes_nothing_even_in_training(layer_norm_first):
    torch.manual_seed(0)
    encoder, video = AVHubertEncoder(**AVHUBERT, layer_norm_first=layer_norm_first), random_video(9)
    padded = F.pad(video, (0, 0, 0, 0, 0, 5), value=7.0)
    mask = torch.arange(14)[None] < 9
    for mode in (True, False):  # BatchNorm takes its statistics from the batch, then from the buffers
        encoder.train(mode)
        close(encoder(padded, mask)[:, :9], encoder(video), atol=1e-4)


def test_frozen_encoder_keeps_its_batch_norm():
    encoder = AVHubertEncoder(**AVHUBERT, dropout=0.5).requires_grad_(False)
    before = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
    assert not any(module.training for module in encoder.train().modules())
    first, again = (encoder(torch.ones(2, 1, 5, 88, 88)) for _ in range(2))
    assert torch.equal(first, again)  # no dropout
    assert before and all(torch.equal(buffer, before[name]) for name, buffer in encoder.named_buffers())
    encoder.requires_grad_(True).train()
    assert not torch.equal(encoder(torch.ones(2, 1, 5, 88, 88)), first)
    assert not all(torch.equal(buffer, before[name]) for name, buffer in encoder.named_buffers())


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"video must be \(B, 1, T, 88, 88\), got \(2, 5, 88, 88\)"):
        AVHubertEncoder(**AVHUBERT)(torch.zeros(2, 5, 88, 88))
    with pytest.raises(InputError, match="must be at least 8, got 8 and .*4"):  # oneDNN would crash
        AVHubertEncoder(**AVHUBERT | {"trunk_widths": [8, 4, 8, 8]})


# --- checkpoints -------------------------------------------------------------------------------------------------


def test_checkpoint_that_runs_code_is_refused(tmp_path):
    class Touch:  # unpickling it creates a file: a checkpoint can run any code
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    torch.save({"model": Touch()}, tmp_path / "evil.pt")
    with pytest.raises(InputError, match="evil.pt: refused.*open"):
        AVHubertEncoder.from_fairseq(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "evil.pt", weights_only=False)["model"].close()  # what would have happened
    assert (tmp_path / "ran").exists()


def test_packed_checkpoint_is_refused(tmp_path):
    torch.save({"model": torch.zeros(10**6)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in plain.namelist():
            bomb.writestr(name, plain.read(name))
    assert (tmp_path / "bomb.pt").stat().st_size < 10**5
    with pytest.raises(InputError, match="bomb.pt: refused, 400.* bytes are packed into"):
        load_inert(tmp_path / "bomb.pt")
    assert len(load_inert(tmp_path / "plain.pt")["model"]) == 10**6


def test_objects_of_foreign_packages_become_inert(tmp_path, monkeypatch):
    module = type(sys)("fairseq")
    module.Dictionary = type("Dictionary", (), {"__module__": "fairseq", "__init__": lambda self: pytest.fail("ran")})
    monkeypatch.setitem(sys.modules, "fairseq", module)
    torch.save({"task": module.Dictionary.__new__(module.Dictionary), "x": torch.ones(2)}, tmp_path / "a.pt")
    monkeypatch.delitem(sys.modules, "fairseq")
    loaded = load_inert(tmp_path / "a.pt")
    assert loaded["x"].tolist() == [1, 1] and loaded["task"] == {}


SIZES = {"encoder_embed_dim": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_embed_dim": 32}
SIZES |= {"layer_norm_first": True, "conv_pos": 8, "conv_pos_groups": 2}
KIND = {"modality_fuse": "concat", "resnet_relu_type": "prelu"}


@pytest.mark.parametrize("checkpoint, message", [
    (None, "no such checkpoint"),
    (b"text", "not a PyTorch checkpoint"),
    ({"weights": {}}, "not a pretrained AV-HuBERT checkpoint of fairseq .*'cfg'"),
    ({"model": {}, "cfg": {"model": SIZES}}, "not a pretrained AV-HuBERT checkpoint of fairseq .*'modality_fuse'"),
    ([1, 2], "not a pretrained AV-HuBERT"),
    ({"model": {}, "cfg": {"model": SIZES | KIND}}, "missing weights"),
    ({"model": {}, "cfg": {"model": SIZES | KIND | {"modality_fuse": "add"}}}, "only modality_fuse=concat"),
])  # fmt: skip
def test_other_files_are_refused_by_name(tmp_path, checkpoint, message):
    path = tmp_path / "a.pt"
    if isinstance(checkpoint, bytes):
        path.write_bytes(checkpoint)
    elif checkpoint is not None:
        torch.save(checkpoint, path)
    with pytest.raises(InputError, match=f"a.pt: {message}"):
        AVHubertEncoder.from_fairseq(path)
