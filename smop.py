"""Sparse Mixture of Projectors (SMoP), the projector of Llama-SMoP (arXiv 2505.14336). Needs only torch: copy it.

A router sends every token to `top_k` of `num_experts` small MLPs; the output is their weighted sum. Parameters grow
with `num_experts`, arithmetic only with `top_k`. (On a GPU, the time grows with `num_experts`, too: on
an H100, 16 experts take 1.5 times as long as 4, with backward 1.9 times.)

    layer = SMoP(dim_in=1024, dim_out=2048, dim_hidden=2048, num_experts=4, top_k=2)
    y, routing = layer(x, mask)                       # x (..., 1024), mask (...) True = a real token; y (..., 2048)
    loss = task_loss + 0.01 * routing.load_balancing_loss + 0.001 * routing.router_z_loss

    projector = MultimodalSMoP({"audio": 512, "video": 1024}, dim_out=2048, config="DEDR")
    y, routing = projector({"audio": xa, "video": xv}, masks={"audio": ma, "video": mv})        # losses as above

Notes for those who copy it:
- Add the two losses to your own loss. They are means over the real tokens of the batch, as in Switch Transformers; with
  several processes, each takes its own batch.
- An expert ends in a LayerNorm, so outputs have a scale of about 1; an LLM's embeddings are far smaller.
- Shared experts or a shared router need features of equal width.
- An expert without tokens still takes part, with gradients of 0, as DistributedDataParallel needs. Under it, give
  MultimodalSMoP every modality in each step, or set find_unused_parameters.

Legend: N real tokens, E = num_experts, k = top_k, D = dim_in, O = dim_out.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class Routing(NamedTuple):
    """What the router decided for each of the N real tokens, in the order of x[mask]."""

    logits: torch.Tensor  # (N, E) float32; float64 if x is
    weights: torch.Tensor  # (N, k) of the chosen experts, best first
    experts: torch.Tensor  # (N, k) int64: the numbers of the chosen experts
    load_balancing_loss: torch.Tensor  # ()
    router_z_loss: torch.Tensor  # ()


class SMoP(nn.Module):
    """Top-k mixture of MLP projectors: y = sum over the chosen experts e of w_e(x) * expert_e(x).

    dim_in, dim_out: widths of the encoder's features and of the LLM's embeddings.
    dim_hidden: width inside an expert (default: dim_out).
    num_experts, top_k: how many experts there are, and how many each token passes through.
        num_experts=1, top_k=1 is the plain MLP projector of Llama-AVSR.
    renormalize: scale the k chosen probabilities to sum 1, as published. The default, None, does so for top_k > 1. With
        top_k=1 the weight would be the constant 1, and the task loss would give the router no gradient.
    """

    def __init__(self, dim_in, dim_out, dim_hidden=None, num_experts=4, top_k=2, renormalize=None):
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k must be between 1 and num_experts={num_experts}, got {top_k}")
        self.top_k, self.renormalize = top_k, top_k > 1 if renormalize is None else renormalize
        self.gate = nn.Linear(dim_in, num_experts, bias=False)
        self.experts = nn.ModuleList(make_expert(dim_in, dim_out, dim_hidden or dim_out) for _ in range(num_experts))

    def forward(self, x, mask=None):
        """Project x (..., D) to (..., O); returns (y, Routing). mask (...) is bool, True = a real token; any other
        mask raises a ValueError."""
        return mix(x, mask, self.gate, self.experts, self.top_k, self.renormalize)


def make_expert(dim_in, dim_out, dim_hidden):
    return nn.Sequential(
        nn.Linear(dim_in, dim_hidden), nn.ReLU(), nn.Linear(dim_hidden, dim_out), nn.LayerNorm(dim_out)
    )


def mix(x, mask, gate, experts, top_k, renormalize):
    """The mixture: x (..., D) -> (y (..., O), Routing). Padding is removed before the router and the experts, so outputs
    and losses do not depend on it. Padded positions get the output 0."""
    if mask is None:
        mask = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
    if mask.shape != x.shape[:-1] or mask.dtype != torch.bool:
        got = f"mask {mask.dtype} {tuple(mask.shape)} for x {tuple(x.shape)}"
        raise ValueError(f"{got}: bool {tuple(x.shape[:-1])} expected")
    real = torch.where(mask)  # indices: with a mask, the CPU waits for a GPU at each use, in the backward pass too
    tokens = x[real]  # (N, D)
    routing = route(tokens, gate, top_k, renormalize)
    projected = combine(tokens, routing, experts)  # (N, O)
    y = projected.new_zeros(*mask.shape, projected.shape[-1])
    y[real] = projected
    return y, routing  # (..., O)


def route(tokens, gate, top_k, renormalize):
    """Router: linear, softmax over all experts, top-k. In float32 at least: rounding to bf16 makes ties."""
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    with torch.autocast(tokens.device.type, enabled=False):
        logits = F.linear(tokens.to(dtype), gate.weight.to(dtype))  # (N, E)
        weights, chosen = logits.softmax(-1).topk(top_k)  # (N, k)
        if renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return Routing(logits, weights, chosen, load_balancing_loss(logits, chosen), router_z_loss(logits))


def combine(tokens, routing, experts):
    """The weighted sum of each token's experts: tokens (N, D) -> (N, O). Each expert runs once, on all its tokens."""
    order = routing.experts.flatten().argsort(stable=True)  # (N*k,): the choices (token * k + slot), sorted by expert
    token = order // routing.experts.shape[1]  # (N*k,): whose choice each is
    sizes = F.one_hot(routing.experts, len(experts)).sum((0, 1)).tolist()  # E numbers; the CPU waits for a GPU here
    inputs = tokens[token].split(sizes)  # E times (n, D); where n is 0, the expert's gradients are 0
    outputs = torch.cat([expert(x) for expert, x in zip(experts, inputs)])  # (N*k, O)
    weights = routing.weights.flatten()[order, None]  # (N*k, 1)
    y = weights.new_zeros(tokens.shape[0], outputs.shape[-1])  # (N, O)
    return y.index_add_(0, token, weights * outputs).to(outputs.dtype)


def load_balancing_loss(logits, chosen):
    """E * sum over e of f_e * P_e: small when the tokens are spread evenly over the experts.

    f_e is the share of tokens that chose expert e in any of their k slots, P_e its mean probability. Experts that are
    chosen equally often give k, a collapsed router up to E. No tokens give 0.
    logits (N, E), chosen (N, k) int64: numbers of experts. Source: Switch Transformer (arXiv 2101.03961), eq. 4-6, summed
    over the slots as in the authors' published code.
    """
    num_experts = logits.shape[-1]
    hits = F.one_hot(chosen, num_experts).sum(-2).to(logits.dtype)  # (N, E)
    return num_experts * (token_mean(hits) * token_mean(logits.softmax(-1))).sum()


def router_z_loss(logits):
    """Mean over the tokens of logsumexp(logits)^2: keeps the logits (N, E) small, where the softmax is exact.

    A router with logits 0 gives log(E)^2. No tokens give 0. Source: ST-MoE (arXiv 2202.08906), eq. 5.
    """
    # (N,), exact as the largest probability is at least 1 / E; torch.export cannot trace torch.logsumexp here
    logsumexp = logits.amax(-1) - logits.softmax(-1).amax(-1).log()
    return token_mean(logsumexp**2)


def token_mean(x):
    """Mean over the first dimension; 0 where it is empty."""
    return x.sum(0) / max(x.shape[0], 1)


class MultimodalRouting(NamedTuple):
    """Routing by modality, and the two losses to train with. Each router's loss is over all tokens that it routes; the
    losses of several routers are added. If the tokens are spread evenly, load_balancing_loss is top_k for a joint router
    and top_k times the number of modalities for disjoint ones."""

    by_modality: dict[str, Routing]
    load_balancing_loss: torch.Tensor
    router_z_loss: torch.Tensor


class MultimodalSMoP(nn.Module):
    """One mixture of projectors for several modalities, in one of the paper's three configurations.

        config   experts               routers
        "DEDR"   one set per modality  one per modality  (disjoint experts, disjoint routers: the paper's best)
        "JEDR"   one set for all       one per modality  (joint experts, disjoint routers)
        "JEJR"   one set for all       one for all       (joint experts, joint router: the authors' published code)

    dims: {modality: width of its features}; what is joint needs equal widths. settings: SMoP's other arguments.
    Every tensor has one name in state_dict(), such as gates.audio.weight and experts.joint.0.0.weight.
    """

    CONFIGS = ("DEDR", "JEDR", "JEJR")

    def __init__(self, dims, dim_out, config="DEDR", **settings):
        super().__init__()
        if config not in self.CONFIGS:
            raise ValueError(f"config must be one of {', '.join(self.CONFIGS)}, got {config!r}")
        if config != "DEDR" and len(set(dims.values())) > 1:
            raise ValueError(f"{config} shares its experts, so all widths must be equal, got {dims}; use DEDR")
        self.router_of = {modality: "joint" if config == "JEJR" else modality for modality in dims}
        self.experts_of = {modality: modality if config == "DEDR" else "joint" for modality in dims}
        self.gates, self.experts = nn.ModuleDict(), nn.ModuleDict()
        for modality, dim in dims.items():
            smop = SMoP(dim, dim_out, **settings)
            if self.router_of[modality] not in self.gates:
                self.gates[self.router_of[modality]] = smop.gate
            if self.experts_of[modality] not in self.experts:
                self.experts[self.experts_of[modality]] = smop.experts
        self.top_k, self.renormalize = smop.top_k, smop.renormalize

    def forward(self, features, masks=None):
        """features {modality: (..., D)}, masks {modality: (...) bool, True = a real token}
        -> ({modality: (..., O)}, MultimodalRouting). An unknown modality, or one without a mask, raises a
        ValueError."""
        outputs, routing = {}, {}
        for modality, x in features.items():
            if modality not in self.router_of:
                raise ValueError(f"unknown modality {modality!r}; expected {', '.join(self.router_of)}")
            if masks is not None and modality not in masks:
                raise ValueError(f"no mask for the modality {modality!r}")
            mask = None if masks is None else masks[modality]
            gate, experts = self.gates[self.router_of[modality]], self.experts[self.experts_of[modality]]
            outputs[modality], routing[modality] = mix(x, mask, gate, experts, self.top_k, self.renormalize)
        balance, z = 0, 0
        for router in dict.fromkeys(self.router_of[modality] for modality in features):
            own = [r for modality, r in routing.items() if self.router_of[modality] == router]
            logits, chosen = torch.cat([r.logits for r in own]), torch.cat([r.experts for r in own])
            balance, z = balance + load_balancing_loss(logits, chosen), z + router_z_loss(logits)
        return outputs, MultimodalRouting(routing, balance, z)
