"""train.py and tools/run.py: train_steps equals a plain loop, in one process and in two; a broken run continues bit by bit."""

import contextlib
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from common import (
    AVHUBERT, ENV, LIMIT, LLM, ROOT, WHISPER, byte_level_tokenizer, close, metrics, run, small_batch, small_model, write_llama,
)  # fmt: skip
from safetensors.torch import load_file, save_file
from torch import nn

import data
import train
from data import collate, load_corpus, plan_run
from encoders import default_window
from eval import evaluate
from model import LlamaSMoP
from tools import run as runs
from tools.errors import InputError
from tools.tokenizer import train_tokenizer

TINY = (
    "--llm", json.dumps(LLM), "--audio-encoder", json.dumps(WHISPER), "--video-encoder", json.dumps(AVHUBERT),
    "--max-frames", 200, "--workers", 0, "--device", "cpu", "--clean-epochs", 1, "--eval-snr", "clean",
)  # fmt: skip
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2)


def train_here(folder, *arguments):
    train.train(*train.parse_args(list(map(str, [*TINY, "--out", folder, *arguments]))))


# --- the gradient of a step --------------------------------------------------------------------------------------


def model_and_uneven_clips():
    """A model without routing losses; one long and three short clips, in seconds and in tokens."""
    texts = ("lay blue at a one now set red by b two soon", "now", "set", "a")
    model = small_model("asr", num_experts=8, top_k=1, load_balancing_weight=0.0, router_z_weight=0.0)
    return model, small_batch("asr", seconds=(1.6, 0.8, 0.6, 0.9), texts=texts)


def _step(rank, folder):
    """One of two processes: a step of train_steps, by plain gradient descent at the rate 1."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model, items = model_and_uneven_clips()
    frames, texts = [len(item["audio"]) // 640 for item in items], [item["text"] for item in items]
    plan = plan_run(frames, model.count_tokens(texts).tolist(), 1, 40, accumulate=4, rank=rank, world=2)
    batches = (collate([items[i] for i in batch]) for batch in plan[0].batches)
    args = train.parse_args(["--lr", "1", "--clip-grad", "1e9", "--out", folder])[0]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.0)
    train.train_steps(model, optimizer, plan, 0, batches, 0, runs.RunFolder(folder, rank), args, lambda *_: None)
    state = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    torch.save((state, plan[0].batches), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_have_the_gradient_of_one(tmp_path):
    """Each accumulates batches of unequal numbers of tokens."""
    torch.multiprocessing.spawn(_step, (str(tmp_path),), nprocs=2)
    model, items = model_and_uneven_clips()
    model(collate(items)).lm.backward()
    gradients, clips = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}, []
    for rank in range(2):
        after, batches = torch.load(tmp_path / f"{rank}.pt")
        clips += [i for batch in batches for i in batch]
        for name, gradient in gradients.items():
            close(after[name], model.get_parameter(name).detach() - gradient, rtol=1e-4, atol=1e-5)
    assert sorted(clips) == [0, 1, 2, 3] and len(batches) > 1
    idle = [not gradient.any() for name, gradient in gradients.items() if ".experts." in name]
    assert any(idle)  # an expert without tokens, under DDP


def test_a_run_is_the_plain_loop_written_out(corpus, tmp_path, monkeypatch):
    """AdamW on each step's gradient, clipped, at the scheduled rate; noise from the second epoch on."""
    honest, add_noise, seen, noisy = LlamaSMoP.forward, data.add_noise, [], []
    flat = lambda tensors: torch.cat([x.detach().flatten() for x in tensors])  # noqa: E731

    def forward(model, batch):
        losses = honest(model, batch)
        if model.training:
            trained = [p for p in model.parameters() if p.requires_grad]
            lm, routing = (
                torch.autograd.grad(loss, trained, retain_graph=True, materialize_grads=True)
                for loss in (losses.lm, losses.auxiliary)
            )
            seen.append(
                (flat(trained), model.count_tokens(batch["texts"]).sum(), losses.lm.detach(), flat(lm), flat(routing))
            )
        return losses

    monkeypatch.setattr(LlamaSMoP, "forward", forward)
    monkeypatch.setattr(data, "add_noise", lambda *args: noisy.append(len(seen)) or add_noise(*args))
    train_here(tmp_path, "--data", corpus, "--max-frames", 100, "--accumulate", 3, "--epochs", 2)
    batches = len(seen) // 2
    assert min(noisy) >= batches  # the first epoch is clean
    assert batches % 3  # the last step of an epoch has fewer batches
    steps = [epoch[i : i + 3] for epoch in (seen[:batches], seen[batches:]) for i in range(0, batches, 3)]
    start = seen[0][0]
    weights = nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([weights], betas=(0.9, 0.98), weight_decay=0.1)
    logged = [line for line in metrics(tmp_path) if "lm" in line]
    assert max(line["grad_norm"] for line in logged) > 1  # some are clipped
    for i, (step, line) in enumerate(zip(steps, logged, strict=True)):
        tokens = sum(n for _, n, *_ in step)
        gradient = sum(n / tokens * lm + routing / len(step) for _, n, _, lm, routing in step)
        close(sum(n / tokens * lm for _, n, lm, *_ in step), line["lm"])
        close(gradient.norm(), line["grad_norm"])
        weights.grad = gradient / max(gradient.norm(), 1)
        optimizer.param_groups[0]["lr"] = 4e-4 * train.learning_rate(i, len(steps), 0.05)
        optimizer.step()
    monkeypatch.undo()
    model = LlamaSMoP.load(tmp_path)
    speeds = [25 * int(model.count_tokens([clip.text])) / clip.frames for clip in load_corpus(corpus, "train")[0]]
    assert model.config["tokens_per_second"] == pytest.approx(max(speeds))
    end = flat(p for p in model.parameters() if p.requires_grad)
    assert (weights - end).norm() < 0.0015 * (end - start).norm()
    clips, load = load_corpus(corpus, "valid")
    dataset = data.ClipDataset(clips, load, model.modalities)
    with torch.no_grad():
        expected = model(collate([dataset[i] for i in range(len(clips))])).lm.item()  # all in one batch
    assert metrics(tmp_path)[-1]["valid_lm"] == pytest.approx(expected, rel=1e-4)


def test_learning_rate_rises_then_falls_as_a_cosine():
    rates = [train.learning_rate(step, 20, 0.1) for step in range(20)]
    close(rates[:3] + rates[11:12] + rates[-1:], [0.5, 1.0, 1.0, 0.5, 0.5 * (1 + math.cos(math.pi * 17 / 18))])


def test_pretrained_llms_have_the_published_recipe():
    recipe = lambda *line: [getattr(train.parse_args(line)[0], x) for x in train.PUBLISHED]  # noqa: E731
    assert recipe("--llm", "a/b") == [10, 0, 1500, 1e-3]
    assert recipe("--llm", "a/b", "--task", "vsr", "--max-frames", "900") == [10, 0, 900, 5e-4]
    assert recipe("--lr", "1e-4") == [6, 3, 320, 1e-4]


def test_zero_db_is_an_snr_of_the_evaluation():
    assert train.parse_args(["--eval-snr", "clean", "0"])[0].snrs == [None, 0.0]


def test_flags_reach_the_model():
    given = {"projector": "JEDR", "num_experts": 3, "top_k": 1, "dim_hidden": 8, "load_balancing_weight": 0.5}
    line = [word for name, x in given.items() for word in (f"--{train.flag(name)}", str(x))]
    model = train.build_model(train.parse_args([*map(str, TINY), *line])[0], train_tokenizer(["now"]))
    assert given.items() <= model.config.items() and len(model.projector.experts["joint"]) == 3
    assert [default_window(x) for x in ("openai/whisper-base", None, {})] == ["30s", "30s", "clip"]


# --- what goes wrong ---------------------------------------------------------------------------------------------


def test_numbers_gone_bad_stop_the_run(corpus, tmp_path, monkeypatch):
    """An infinite gradient of a finite loss: the clips are named, the checkpoint stays, and a lower rate may continue."""
    honest, calls = LlamaSMoP.forward, []

    def forward(model, batch):
        calls.extend([batch["ids"]] * model.training)
        losses = honest(model, batch)
        return losses._replace(lm=losses.lm + (losses.lm - losses.lm.detach()).sqrt()) if len(calls) > 5 else losses

    with monkeypatch.context() as patch:
        patch.setattr(LlamaSMoP, "forward", forward)
        with pytest.raises(InputError, match="step 6: a loss or gradient is not finite.*--lr RATE.*clips") as stop:
            train_here(tmp_path, "--data", corpus, "--task", "asr", "--save-every", 1, "--epochs", 4)
    assert str(stop.value).endswith(", ".join(calls[-1])) and len(metrics(tmp_path)) >= 5
    assert torch.load(tmp_path / "checkpoint.pt")["step"] == 5
    train.train(*train.parse_args(["--resume", str(tmp_path), "--lr", "1e-4"]))
    rates = [line["lr"] for line in metrics(tmp_path) if "lr" in line]
    assert rates[4] > 1e-4 >= max(rates[5:]) and (tmp_path / "results.json").exists()


def test_collapsed_router_is_warned_about(corpus, tmp_path, monkeypatch, capsys):
    mlp = ("--projector", "mlp", "--task", "vsr", "--eval-snr", "clean 0")  # no sound, no SNR
    train_here(tmp_path / "mlp", "--data", corpus, "--epochs", 1, *mlp)
    assert "a router has collapsed" not in capsys.readouterr().out
    assert json.loads((tmp_path / "mlp" / "results.json").read_text())["wer"].keys() == {"clean"}
    import smop

    route = smop.route
    everything_to_two = lambda *args: route(*args)._replace(  # noqa: E731
        experts=torch.tensor([1, 2]).expand_as(route(*args).experts)
    )
    monkeypatch.setattr(smop, "route", everything_to_two)
    train_here(tmp_path / "dedr", "--data", corpus, "--epochs", 1)
    assert capsys.readouterr().out.count("warning: a router has collapsed") == 2  # one a modality
    assert metrics(tmp_path / "dedr")[-1]["usage"]["video"] == [0, 1, 1, 0]


def test_a_bad_clip_ends_the_run_by_name(corpus, tmp_path):
    """With workers, too, which must not outlive it."""
    shutil.copytree(corpus, tmp_path / "corpus")
    bad = sorted((tmp_path / "corpus").glob("train*.mp4"))[3]
    bad.write_text("no media")
    printed = run("train.py", *TINY, "--data", tmp_path / "corpus", "--workers", 2, "--out", tmp_path / "run", code=1)
    assert printed.count("error: ") == 1 and f"error: {bad}: " in printed and "Traceback" not in printed


@pytest.mark.parametrize("setting, message", [
    (("--audio-pool", 300), "train-0000: too short for audio pooling by 300; train-0001"),
    (("--average", 3, "--epochs", 2), "--average 3 is more than --epochs 2"),
    (("--task", "tts"), "--task must be one of asr, vsr, avsr, got 'tts'"),
    (("--top-k", 5), "--top-k 5 is more than --num-experts 4"),
    (("--epochs", 0), "--epochs must be above 0"),
    (("--lr", "nan"), "--lr must be above 0, got nan"),
    (("--eval-snr", ""), "--eval-snr is empty"),
    (("--device", "cpux"), "--device cpux: "),
    (("--llm", "{"), "--llm: not valid JSON"),
    (("--data", "nowhere"), "nowhere/train.csv: no such manifest"),
])  # fmt: skip
def test_wrong_settings_are_refused_before_training(setting, message, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "load_noise", lambda *_: pytest.fail("work began"))
    with pytest.raises(InputError, match=message):
        train_here(tmp_path, *setting)


# --- runs that are broken and continue ------------------------------------------------------------------------------


def assert_same_run(a, b):
    """Equal weights, losses and results, bit by bit."""
    weights, others = (load_file(folder / "model.safetensors") for folder in (a, b))
    assert weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)
    assert metrics(a) == metrics(b) and len(metrics(a)) > 6
    for name in ("results.json", "hypotheses.jsonl"):
        assert (a / name).read_text() == (b / name).read_text()


def wait_until(condition, process):
    """Until the condition holds, while the process lives; it is killed where that takes too long."""
    begin = time.time()
    while not condition():
        if process.poll() is not None or time.time() - begin > LIMIT:
            process.kill()
            pytest.fail(f"the process ended with {process.wait()} before it was to be disturbed")
        time.sleep(0.005)


def test_a_broken_run_goes_on_bit_by_bit(corpus, tmp_path):
    """Killed within an epoch, interrupted twice, and continued by the same command: it equals an unbroken one."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    common = ("train.py", *TINY, "--data", corpus, "--save-every", 1, "--average", 2, "--epochs", 8,
              "--eval-snr", "clean 0")  # fmt: skip
    run(*common, "--out", whole)
    command = [sys.executable, *map(str, (*common, "--workers", 2, "--out", broken))]  # workers change nothing
    process = subprocess.Popen(command, cwd=ROOT, env=ENV)
    log = broken / "metrics.jsonl"
    wait_until(lambda: log.exists() and len(log.read_text().splitlines()) >= 8, process)
    with pytest.raises(InputError, match="broken: another process writes this folder"):
        runs.RunFolder(broken).begin({})
    process.kill()
    process.wait()
    assert not (broken / "results.json").exists()
    for number in (signal.SIGINT, signal.SIGTERM):  # to the workers, too, as a terminal and a batch system send them
        lines = len(log.read_text().splitlines())
        process = subprocess.Popen(
            command, cwd=ROOT, env=ENV, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        wait_until(lambda: len(log.read_text().splitlines()) >= lines + 3, process)
        os.killpg(process.pid, number)
        printed = process.communicate(timeout=LIMIT)[0]
        assert "interrupted; repeat the command, without --overwrite, to continue" in printed
        step = torch.load(broken / "checkpoint.pt")["step"]
        assert process.returncode == 130 and step == metrics(broken)[-1]["step"]  # not a step is lost
    with pytest.raises(InputError, match="drop --epochs"):
        train.parse_args(["--resume", str(broken), "--epochs", "9"])
    run(*command[1:])
    assert_same_run(whole, broken)
    with pytest.raises(InputError, match="a finished run; --overwrite deletes it and starts anew"):
        runs.RunFolder(broken).begin({})

    first, second = map(load_file, whole.glob("epoch-*.safetensors"))  # --average 2
    for name, x in load_file(whole / "model.safetensors").items():
        close(x.double(), (first[name].double() + second[name].double()).div(2).to(x).double())


@pytest.mark.filterwarnings("ignore:Glyph")  # what an untrained model writes stands in clip.png
@pytest.mark.parametrize("pretrained", [False, True])
def test_a_run_that_goes_on_keeps_its_tokens_and_its_clips(corpus, tmp_path, monkeypatch, pretrained):
    shutil.copytree(corpus, tmp_path / "corpus")
    stop = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)  # noqa: E731
    command = ("--data", tmp_path / "corpus", "--task", "asr", "--epochs", 3)
    if pretrained:  # with LoRA, and five tokens that the run adds
        write_llama(tmp_path / "llm", vocab_size=len(byte_level_tokenizer(tmp_path / "llm")))
        command += ("--llm", tmp_path / "llm")
    train_here(tmp_path / "whole", *command)
    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", stop)
        with pytest.raises(KeyboardInterrupt):
            train_here(tmp_path / "run", *command)
    manifest = tmp_path / "corpus" / "train.csv"
    manifest.write_text(manifest.read_text().rstrip() + " more\n")
    with pytest.raises(InputError, match=r"run: begun with train split \(checksum\) \d+, which is now \d+"):
        train_here(tmp_path / "run", *command)
    shutil.copy(corpus / "train.csv", manifest)
    monkeypatch.setattr(train, "train_tokenizer", lambda *_: pytest.fail("the tokenizer is in the run folder"))
    train_here(tmp_path / "run", *command)
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    monkeypatch.setattr(train, "train_tokenizer", train_tokenizer)
    train_here(tmp_path / "run", *command, "--epochs", 1, "--overwrite")
    assert metrics(tmp_path / "run")[-1]["epoch"] == 0


def test_a_new_run_leaves_nothing_of_the_old_one(tmp_path):
    """An interrupted new run must not look finished, nor be read with the old weights."""
    for name in ("checkpoint.pt", "results.json", "config.json", "model.safetensors", "epoch-3.safetensors"):
        (tmp_path / name).write_text("old")
    runs.RunFolder(tmp_path).begin({"out": "a"}, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"args.json", "lock"}
    (tmp_path / "checkpoint.pt").write_text("new")
    runs.RunFolder(tmp_path).begin({"out": "./a", "device": "cpu"})  # the same folder, on another machine
    with pytest.raises(InputError, match="an interrupted run with other arguments .lr None, now 2"):
        runs.RunFolder(tmp_path).begin({"out": "a", "lr": 2})


def test_a_signal_after_the_last_step_ends_the_run():
    with pytest.raises(KeyboardInterrupt), runs.Signals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.seen() == 1


def test_a_run_that_dies_at_any_write_goes_on(corpus, tmp_path, monkeypatch):
    """The n-th attempt dies before its n-th file is in place, until one attempt finishes."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    dropout = json.dumps(AVHUBERT | {"dropout": 0.2})
    command = ("--data", corpus, "--task", "vsr", "--video-encoder", dropout, "--epochs", 3, "--average", 2)
    command += ("--save-every", 1)
    train_here(whole, *command)
    replace, attempts = os.replace, 0
    while not (broken / "results.json").exists():
        left, attempts = itertools.count(attempts, -1), attempts + 1
        monkeypatch.setattr(os, "replace", lambda *paths, left=left: replace(*paths) if next(left) else 1 / 0)
        with contextlib.suppress(ZeroDivisionError):
            train_here(broken, *command)
    assert attempts > 5
    assert_same_run(whole, broken)


def test_two_processes_train_go_on_and_evaluate(corpus, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    dropout = json.dumps(AVHUBERT | {"dropout": 0.2})  # LayerDrop, too: each process draws its own
    command = (*TORCHRUN, "train.py", *TINY, "--data", corpus, "--video-encoder", dropout, "--epochs", 4, "--average", 2,
               "--max-frames", 100, "--save-every", 1, "--eval-snr", "clean 0", "--out", whole)  # fmt: skip
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, env=ENV)
    wait_until(lambda: (whole / "checkpoint.pt").exists() and len(metrics(whole)) >= 3, process)
    broken.mkdir()  # as a killed run leaves it: the log is never behind the checkpoint
    for pattern in ("*.json", "checkpoint.pt", "metrics.jsonl", "epoch-*.safetensors"):
        for path in whole.glob(pattern):
            shutil.copy(path, broken)
    assert process.wait(LIMIT) == 0
    run(*TORCHRUN, "train.py", "--resume", broken)
    assert_same_run(whole, broken)
    assert [m["step"] for m in metrics(whole) if "lr" in m] == list(range(1, 1 + metrics(whole)[-1]["step"]))

    run(*TORCHRUN, "eval.py", whole, "--data", "synthetic", "--split", "valid", "--device", "cpu", "--out", tmp_path)
    for folder, source, split in ((whole, corpus, "test"), (tmp_path, "synthetic", "valid")):  # one batch and several
        results, hypotheses = evaluate(LlamaSMoP.load(whole), *load_corpus(source, split))
        lines = [json.loads(line) for line in open(folder / "hypotheses.jsonl")]
        assert [line for line in lines if line["snr"] == "clean"] == hypotheses
        theirs = json.loads((folder / "results.json").read_text())
        assert theirs["wer"]["clean"] == results["wer"]["clean"] and theirs["clips"] == results["clips"]
        for modality in ("audio", "video"):
            close(theirs["routing"][modality]["usage"], results["routing"][modality]["usage"], atol=2e-4)


def test_full_disk_keeps_the_previous_file(tmp_path):
    resource = pytest.importorskip("resource", reason="no limits on this system")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for write in (torch.save, save_file):
        runs.write_atomically(tmp_path / "a", lambda path: write({"x": torch.zeros(9)}, path))
        before = (tmp_path / "a").read_bytes()
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            with pytest.raises(InputError, match="a: could not be written, is the disk full.*the previous one is kept"):
                runs.write_atomically(tmp_path / "a", lambda path: write({"x": torch.zeros(99_999)}, path))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert (tmp_path / "a").read_bytes() == before and os.listdir(tmp_path) == ["a"]
    with pytest.raises(InputError, match=r"nowhere/a: could not be written \(.*No such file") as error:
        runs.write_atomically(tmp_path / "nowhere" / "a", lambda path: path.write_text("text"))
    assert "is the disk full" not in str(error.value)


def test_run_folders_of_another_version_are_refused(tmp_path):
    args = json.loads(json.dumps(train.Args().__dict__ | {"experts": 4}))
    del args["num_experts"], args["snrs"]
    (tmp_path / "args.json").write_text(json.dumps(args))
    with pytest.raises(InputError, match="args.json: of another version .* experts, num_experts"):
        train.parse_args(["--resume", str(tmp_path)])
