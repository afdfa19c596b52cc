"""The study: its costs compare equal things, its tables and verdicts follow from the runs, and it continues; the README."""

import json
import re
import sys

import pytest
import torch
from common import LLM, ROOT, command, small_model
from safetensors.torch import load_file

import synthetic
from data import ClipDataset, collate, load_corpus
from study import bench, claims, page, reproduce
from tools import encode
from tools.errors import InputError
from train import parse_args


@pytest.mark.parametrize("num_beams", [1, 4])
def test_shared_prefix_decodes_as_the_published_way(num_beams):
    model = small_model().eval()
    clips, load = load_corpus("synthetic", "test")
    dataset = ClipDataset(clips[:3], load, model.modalities)
    items, settings = [dataset[i] for i in range(3)], {"max_new_tokens": 6, "min_new_tokens": 6}
    with torch.no_grad():
        expected = bench.one_by_one(model, items, num_beams, **settings)
    assert torch.equal(model.generate_ids(collate(items), num_beams, **settings), expected)
    assert len(expected.unique(dim=0)) > 1


def test_bench_compares_equal_things(monkeypatch, tmp_path):
    for size in "DHO":
        monkeypatch.setattr(bench, size, 8)
    monkeypatch.setattr(bench.compare, "__defaults__", (0, 1))  # once
    assert len(bench.bench_projector(torch.device("cpu"), torch.float32)) == 4  # asserts that the outputs are equal
    rows = bench.bench_experts(torch.device("cpu"), torch.float32)
    assert [row["experts"] for row in rows] == [4, 8, 16, 32, 64] * 2
    bench.draw_experts(rows, tmp_path / "experts.png")
    rows = bench.bench_paper(torch.device("cpu"), torch.float32, seconds=1, frames=50)
    assert [row["hours for 433 h"] * row["clips/s"] for row in rows] == pytest.approx([433] * 4)  # of a second each


def test_a_difference_is_paired_over_clips():
    keys = [(snr, f"clip{i}") for i in range(50) for snr in ("clean", "0")]
    hard = {key: (1 + i % 12 // 2, 6) for i, key in enumerate(keys)}  # clips differ much more than the models do
    gain = {key: (errors - (i % 3 == 0), words) for i, (key, (errors, words)) in enumerate(hard.items())}
    gains, hards = ({seed: run for seed in range(3)} for run in (gain, hard))
    better = claims.difference(gains, hards, ["clean", "0"])
    assert better["points"] == round(-100 * 34 / 600, 2) and (better["lower"], better["verdict"]) == ("3 of 3", "shown")
    assert claims.difference(hards, gains, ["clean", "0"])["verdict"] == "opposite"
    assert claims.difference(hards, hards, ["clean", "0"])["verdict"] == "not shown"
    assert claims.difference({0: gain}, {0: hard}, ["clean", "0"])["verdict"] == "open"  # a seed may be luck
    once = claims.difference({0: gain, 1: hard, 2: hard}, hards, ["clean", "0"])  # in one seed of three
    assert once["points"] < 0 and once["verdict"] == "not shown"


def test_readme_example_runs():
    """The block under "Copy the projector"."""
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names = {}
    exec(block, names)
    assert names["y"]["audio"].shape == (2, 50, 2048) and names["loss"].isfinite()


def read_arguments(monkeypatch, line):
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *line.split()])
    return reproduce.read_arguments()


def test_readme_counts_the_runs(monkeypatch):
    text = (ROOT / "study" / "README.md").read_text()
    found = re.findall(r"^python -m study.reproduce (.*?) +# (\d+) runs", text, re.MULTILINE)
    for line, runs in found:
        assert len(reproduce.runs_of(read_arguments(monkeypatch, line))) == int(runs), line
    assert found


def test_shares_take_the_same_number_of_steps(monkeypatch):
    args = read_arguments(monkeypatch, "--data grid --claims data -- --epochs 3")
    clips_seen = set()
    for cell, seed in reproduce.runs_of(args):
        given = parse_args(reproduce.arguments(cell, seed, args))[0]
        clips_seen.add((given.epochs * cell.share, given.clean_epochs * cell.share))
    assert clips_seen == {(3, reproduce.RECIPE["clean_epochs"])}


def test_tables_and_pictures_are_of_the_runs(monkeypatch, tmp_path):
    """Three seeds: the MLP misses every second word, the mixtures every fourth; on other talkers all miss all."""
    args = read_arguments(monkeypatch, f"--data {tmp_path}/grid --seeds 3 --runs {tmp_path}/runs --out {tmp_path}/out")
    (tmp_path / "grid").mkdir()
    rows = "".join(f"clip{i},train/000,75,bin blue at f\n" for i in range(20))
    (tmp_path / "grid" / "train.csv").write_text("id,path,frames,text\n" + rows)
    for share in (0.25, 0.5):
        reproduce.make_share(share, args)
        assert len(load_corpus(reproduce.share_folder(share, args), "train")[0]) == 20 * share
    runs = reproduce.runs_of(args)
    for (cell, seed), folder in runs.items():
        hypothesis, wer = ("bin blue", 50.0) if cell.projector == "mlp" else ("bin blue at", 25.0)
        snrs = claims.SNRS if cell.task != "vsr" else ["clean"]
        lines = [{"snr": snr, "id": i, "reference": "bin blue at f"} for snr in snrs for i in range(10)]
        lines = [json.dumps(line | {"hypothesis": hypothesis}) + "\n" for line in lines]
        usage = {"usage": [0.5] * cell.num_experts if cell.balance else [0.1, 0.9, 0.5, 0.5]}
        results = {"wer": dict.fromkeys(snrs, wer), "routing": {"audio": usage, "video": usage}}
        results |= {"device": "a CPU", "clips": 10, "num_beams": 1, "data": reproduce.arguments(cell, seed, args)[1]}
        sizes = {"trained": 2e6, "projector": 1e6, "active": 5e5}
        files = {"results": results, "sizes": sizes, "decode": [1.0] * 9, "others/results": {"wer": {"clean": 100.0}}}
        (folder / "others").mkdir(parents=True)
        for place in (folder, folder / "others"):
            (place / "hypotheses.jsonl").write_text("".join(lines))
        for name, value in files.items():
            (folder / f"{name}.json").write_text(json.dumps(value))
    page.write(runs, args)
    table = (tmp_path / "out" / "grid.md").read_text()
    row = "| AVSR MLP small | 50.0 ± 0.0 | 50.0 ± 0.0 | 50.0 ± 0.0 | 100.0 ± 0.0 | – | 3 | 2.00 | 1.00 | 0.50 |"
    assert row in table and "| VSR MLP small | 50.0 ± 0.0 | – | – |" in table
    assert "AVSR DEDR e4 k2 small against AVSR MLP small: -25.0 points of WER [-25.0, -25.0], lower in 3 of 3" in table
    assert ": **shown**; on other talkers -25.0 points of WER [-25.0, -25.0], lower in 3 of 3 seeds: **shown**" in table
    assert "| 50, 50, 50, 50 |" in table and "the rarest, by seed, 10.0, 10.0, 10.0 %: **not shown**" in table
    assert "decodes in at most 1.1 times the MLP's time: 1.00 [1.00, 1.00]: **shown**" in table
    assert len(list((tmp_path / "out").glob("grid-*.png"))) == 6


def test_study_goes_on_and_refuses_changed_runs(monkeypatch, tmp_path, capsys):
    """Four cells on features of a few clips, evaluated on the same clips as others."""
    for split, count in (("train", 8), ("valid", 2), ("test", 4)):
        monkeypatch.setitem(synthetic.SIZES, split, count)
    small_model().save(tmp_path / "encoders")
    encoders = f"--audio-encoder {tmp_path}/encoders --video-encoder {tmp_path}/encoders"
    command(encode, *f"synthetic {tmp_path}/tiny {encoders} --copies 1 --workers 0".split())
    (tmp_path / "tiny" / "others.csv").write_text((tmp_path / "tiny" / "test.csv").read_text())

    def study(*extra):
        line = f"--seeds 1 --claims usage --data {tmp_path}/tiny --runs {tmp_path}/runs --out {tmp_path}/out -- "
        line += "--epochs 2 --clean-epochs 1 --max-frames 200 --device cpu"
        command(reproduce, *line.split(), "--llm", json.dumps(LLM), *extra)
        return capsys.readouterr().out

    assert "0 runs are finished, 4 to train" in study()
    dedr = tmp_path / "runs" / "tiny" / "avsr-dedr-e4-k2-small-s0"
    results = json.loads((dedr / "results.json").read_text())
    assert json.loads((dedr / "others" / "results.json").read_text())["wer"] == results["wer"]
    weights = load_file(dedr / "model.safetensors")
    count = lambda *parts: sum(x.numel() for name, x in weights.items() if name.startswith(parts))  # noqa: E731
    sizes = {"trained": count("projector.", "llm."), "projector": count("projector.")}
    sizes["active"] = count("projector.gates.audio.") + 2 * count("projector.experts.audio.3.")
    assert json.loads((dedr / "sizes.json").read_text()) == sizes
    (dedr / "results.json").unlink()  # as if it had been killed
    assert "3 runs are finished, 1 to train" in study()
    assert json.loads((dedr / "results.json").read_text())["wer"] == results["wer"]
    with pytest.raises(InputError, match="s0: trained with another --prompt; delete it"):
        study("--prompt", "now")
