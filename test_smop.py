"""Tests of smop.py: against published numbers, against a naive loop, with and without padding. Copy them along with it.

    pytest -q test_smop.py

tests/golden/smop.npz holds outputs, losses and gradients of the authors' published mixture with random weights. Without
it, its test is skipped.
"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from smop import MultimodalSMoP, SMoP, load_balancing_loss, router_z_loss

GOLDEN = Path(__file__).resolve().parent / "tests/golden/smop.npz"


def close(a, b, rtol=1e-5, atol=1e-5):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=rtol, atol=atol)


@pytest.mark.skipif(not GOLDEN.is_file(), reason=f"needs {GOLDEN}")
def test_mixture_equals_published_numbers():
    check_published(np.load(GOLDEN), "e4_k2")


def check_published(golden, case):
    get = lambda name: torch.from_numpy(golden[f"{case}.{name}"])  # noqa: E731
    num_experts, top_k, dim_in, dim_hidden, dim_out = get("config").tolist()
    layer = SMoP(dim_in, dim_out, dim_hidden, num_experts, top_k, renormalize=True)
    layer.load_state_dict({name: get(f"w.{name}") for name in layer.state_dict()})
    x = get("x").requires_grad_()
    y, routing = layer(x)
    close(y, get("out"))
    close(routing.logits, get("router_logits"))
    assert torch.equal(routing.experts, get("selected_experts"))
    close(routing.load_balancing_loss, get("load_balancing_loss"))
    close(routing.router_z_loss, get("z_loss"))
    ((y * get("g")).sum() + 0.01 * routing.load_balancing_loss + 0.001 * routing.router_z_loss).backward()
    close(x.grad, get("grad.x"), rtol=1e-4)
    for name, parameter in layer.named_parameters():
        close(parameter.grad, get(f"grad.{name}"), rtol=1e-4)


@pytest.mark.parametrize("num_experts, top_k, renormalize", [(4, 2, True), (5, 3, False), (3, 1, False), (1, 1, True)])
def test_mixture_equals_naive_loop(num_experts, top_k, renormalize):
    torch.manual_seed(0)
    layer = SMoP(6, 5, 7, num_experts, top_k, renormalize).double()
    x = torch.randn(2, 9, 6, dtype=torch.double, requires_grad=True)
    y, _ = layer(x)
    rows = []
    for token in x.flatten(0, 1):
        p = (layer.gate.weight @ token).softmax(0)
        best = p.argsort(descending=True)[:top_k]
        total = p[best].sum() if renormalize else 1
        rows.append(sum(p[e] / total * layer.experts[e](token) for e in best))
    expected = torch.stack(rows).view_as(y)
    close(y, expected, atol=1e-12)
    g = torch.randn_like(y)
    parameters = [x, *layer.parameters()]
    ours = torch.autograd.grad((y * g).sum(), parameters)
    theirs = torch.autograd.grad((expected * g).sum(), parameters, allow_unused=True)
    for a, b in zip(ours, theirs):
        close(a, torch.zeros_like(a) if b is None else b, atol=1e-12)


def test_padding_changes_nothing():
    torch.manual_seed(0)
    layer = SMoP(6, 5, num_experts=4, top_k=2)
    x = torch.randn(3, 8, 6)
    mask = torch.arange(8) < torch.tensor([[8], [3], [0]])
    padded = x.masked_fill(~mask[..., None], float("nan")).requires_grad_()
    real = x[mask].requires_grad_()
    results = []
    for tokens, m in ((padded, mask), (real, None)):
        layer.zero_grad()
        y, routing = layer(tokens, m)
        (y.square().sum() + routing.load_balancing_loss + routing.router_z_loss).backward()
        results.append([routing.load_balancing_loss, routing.router_z_loss, *[p.grad for p in layer.parameters()]])
        if m is not None:
            assert not y[~m].any() and not tokens.grad[~m].any() and len(routing.experts) == m.sum()
        results[-1] += [y if m is None else y[m], tokens.grad if m is None else tokens.grad[m]]
    for a, b in zip(*results):
        close(a, b)


@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6), (2, 3, 6)])
def test_no_token_gives_zeros(shape):
    layer = SMoP(6, 5)
    x = torch.randn(shape, requires_grad=True)
    y, routing = layer(x, torch.zeros(shape[:-1], dtype=torch.bool))
    total = y.sum() + routing.load_balancing_loss + routing.router_z_loss
    total.backward()
    assert y.shape == (*shape[:-1], 5) and total == 0
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())


def test_losses_have_their_stated_values():
    logits = torch.zeros(400, 4)
    experts = torch.stack([torch.arange(400) % 4, (torch.arange(400) + 1) % 4], 1)
    assert load_balancing_loss(logits, experts).item() == pytest.approx(2)  # balanced: k
    assert router_z_loss(logits).item() == pytest.approx(math.log(4) ** 2)
    logits[:, 0] = 50.0
    collapsed = load_balancing_loss(logits, torch.zeros(400, 1, dtype=torch.long))
    assert collapsed.item() == pytest.approx(4)  # everything to one expert: E
    everything = torch.arange(4).expand(400, 4)
    assert load_balancing_loss(torch.randn(400, 4), everything).item() == pytest.approx(4)  # k = E: exactly E


def test_renormalised_top1_gives_the_router_no_gradient():
    x = torch.randn(50, 6)
    for renormalize in (True, False, None):  # None, the default, is False here
        layer = SMoP(6, 5, num_experts=4, top_k=1, renormalize=renormalize)
        layer(x)[0].square().sum().backward()
        assert (layer.gate.weight.grad.abs().max() < 1e-3) == (renormalize is True)
    assert SMoP(6, 5, top_k=2).renormalize


def test_router_stays_in_float32():
    layer = SMoP(6, 5)
    x = torch.randn(10, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y, routing = layer(x)
    assert routing.logits.dtype == routing.weights.dtype == torch.float32
    close(routing.logits, layer(x)[1].logits)
    y, routing = layer.bfloat16()(x.bfloat16())
    assert y.dtype == torch.bfloat16 and routing.logits.dtype == torch.float32
    close(routing.logits, x.bfloat16().float() @ layer.gate.weight.float().T)


def test_mixture_compiles_and_exports():
    layer = SMoP(6, 5)
    x, mask = torch.randn(4, 7, 6), torch.rand(4, 7) > 0.3
    expected = layer(x, mask)[0]
    any_shape = {"capture_dynamic_output_shape_ops": True, "capture_scalar_outputs": True}  # the router decides
    with torch._dynamo.config.patch(any_shape):
        y, _ = torch.compile(layer, backend="aot_eager", fullgraph=True)(x, mask)  # no C++ compiler needed
    close(y, expected)
    y.sum().backward()
    close(torch.export.export(layer, (x, mask)).module()(x, mask)[0], expected)


SHARED = {"DEDR": [], "JEDR": ["experts"], "JEJR": ["experts", "gates"]}


@pytest.mark.parametrize("config", SHARED)
def test_configurations_share_what_they_say(config):
    """Each modality goes through the SMoP made of its gate and its experts; a router's losses are over all its tokens."""
    torch.manual_seed(0)
    projector = MultimodalSMoP({"audio": 6, "video": 6}, 5, config, num_experts=4, top_k=2)
    x = {"audio": torch.randn(2, 9, 6), "video": torch.randn(2, 4, 6)}
    masks = {"audio": torch.rand(2, 9) > 0.2, "video": torch.rand(2, 4) > 0.2}
    parts = {part: {name.split(".")[1] for name in projector.state_dict() if name.startswith(part)}
             for part in ("gates", "experts")}  # fmt: skip
    assert all(names == ({"joint"} if part in SHARED[config] else set(x)) for part, names in parts.items())
    assert len({x.data_ptr() for x in projector.state_dict().values()}) == len(projector.state_dict())  # one name each
    smops = {}
    for modality in x:
        smops[modality] = SMoP(6, 5)
        smops[modality].gate = projector.gates["joint" if "gates" in SHARED[config] else modality]
        smops[modality].experts = projector.experts["joint" if "experts" in SHARED[config] else modality]
    y, routing = projector(x, masks)
    for modality in x:
        close(y[modality], smops[modality](x[modality], masks[modality])[0])
    if config == "JEJR":
        expected = [smops["audio"](torch.cat([x[modality][masks[modality]] for modality in x]))[1]]
    else:
        expected = [smops[modality](x[modality], masks[modality])[1] for modality in x]
    close(routing.load_balancing_loss, sum(r.load_balancing_loss for r in expected))
    close(routing.router_z_loss, sum(r.router_z_loss for r in expected))
    close(projector(x)[0]["audio"], smops["audio"](x["audio"])[0])
    y, routing = projector({"video": x["video"]})
    assert y["video"].shape == (2, 4, 5) and list(routing.by_modality) == ["video"]


def test_wrong_mixtures_are_refused():
    with pytest.raises(ValueError, match="use DEDR"):
        MultimodalSMoP({"audio": 6, "video": 8}, 5, "JEJR")
    with pytest.raises(ValueError, match="DEDR, JEDR, JEJR"):
        MultimodalSMoP({"audio": 6}, 5, "dense")
    with pytest.raises(ValueError, match="top_k"):
        SMoP(6, 5, num_experts=2, top_k=3)
    with pytest.raises(ValueError, match="mask"):
        SMoP(6, 5)(torch.randn(2, 3, 6), torch.ones(2, 4, dtype=torch.bool))
    projector, x = MultimodalSMoP({"audio": 6}, 5), torch.randn(2, 6)
    with pytest.raises(ValueError, match="unknown modality 'touch'; expected audio"):
        projector({"touch": x})
    with pytest.raises(ValueError, match="no mask for the modality 'audio'"):
        projector({"audio": x}, {})
