"""The benchmark of real sizes: every row runs at small width, formulas are what they say, each row is on disk before the next."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from muralist.bench import rows, table, wan
from muralist.bench.clock import Cost
from muralist.bench.lab import Lab, Linears, Pipeline, random
from muralist.bench.rows import ROWS, Figure, ratio
from muralist.cost import transformer
from muralist.cost.machine import Machine
from muralist.nn import fp8
from muralist.nn.transformer import MuralTransformer
from tests.shell import muralist

CPU = torch.device("cpu")


class Told(Lab):
    """Measurements that are given: a forward takes what its kind says."""

    TIMES = {"full": 100.0, "windows": 2.0, "guided": 2.5, "branched": 10.0, "branched dense": 25.0}  # noqa: RUF012

    def forward(self, name, grid, kind):
        return Cost(1.0 if grid == "480p x81" else 8.0 if grid == "720p x49" else self.TIMES[kind], 5)

    def decode(self, name, grid, how):
        return Cost({"ours": 20.0, "diffusers": 80.0}[how], 8 * 10**9)

    def linears(self, name, grid):
        return {"off": Linears(Cost(3.0, 4 * 10**9), Cost(4.0, 2 * 10**9), 0.05), "blocks": Linears(Cost(3.0, 4 * 10**9), Cost(1.5, 2 * 10**9), 0.05)}

    def ceilings(self):
        return replace(Machine.of("140GB"), matmul_flops=1e15)

    def pipeline(self, name, grid):
        return Pipeline(30.0, 8.0, 20.0, 12 * 10**9)


def values(name: str) -> list[float]:
    return [figure.value for figure in ROWS[name](Told(CPU, torch.float32, "real"))]


def test_rows_are_the_formulas_that_they_name():
    assert values("H2") == pytest.approx([(100 * 100 + 20) / (100 * (2.5 + 1) + 20)])
    assert values("H3") == pytest.approx([(100 * 100 + 20) / (4 * 2 + 20)])
    assert values("H4") == pytest.approx([10, 4, 10, 4])
    assert values("H5") == pytest.approx([25, 1250, 25, 1250])
    assert values("H6") == pytest.approx([100 * 100 / (2 * (50 * 8 + 45 * 2))])
    assert values("H7")[1:] == pytest.approx([2, 0.75, 4, 2, 4, 0.05, 2, 1.5, 2, 4, 0.05])
    assert values("H8")[:3] == pytest.approx([4, 20, 8])
    assert values("H10") == pytest.approx([30 / 28, 30 / 28])
    assert values("H9") == pytest.approx([12, 12]) and values("H11") == pytest.approx([30, 30])


def test_a_goal_is_met_from_its_own_side():
    assert ratio("x", 1.0, 10.0, goal=10.0).met and not ratio("x", 1.0, 9.0, goal=10.0).met
    assert Figure(what="x", value=3.0, goal=3.4, less=True).met and not Figure(what="x", value=3.5, goal=3.4, less=True).met
    assert Figure(what="x", value=1.0).met is None


@pytest.mark.parametrize("name", ["1.3B", "5B"])
def test_the_published_sizes_have_the_published_number_of_weights(name):
    size = wan.SIZES[name]
    assert transformer.parameters(transformer.Dimensions.of(size.transformer)) == size.parameters


def test_full_attention_of_many_blocks_follows_from_one():
    class Timed(Lab):
        def _blocks(self, name, grid, kind, layers):
            return Cost({("windows", 2): 1.0, ("windows", 1): 0.6, ("full", 1): 3.0}[kind, layers], 7)

    lab = Timed(CPU, torch.float32, "small")
    # a block in windows takes 0.4, so 0.2 is outside of them, and a block with full attention takes 2.8
    assert lab.forward("1.3B", "4K x81", "full") == Cost(pytest.approx(0.2 + 2 * 2.8), 7)


def test_random_models_never_exist_in_float32():
    made = random(lambda: MuralTransformer(**wan.SMALL["1.3B"].transformer), CPU, torch.bfloat16)
    assert {parameter.dtype for parameter in made.parameters()} == {torch.bfloat16}
    assert all(parameter.any() for parameter in made.parameters())


def test_rows_are_kept_one_by_one_and_a_row_that_does_not_fit_says_so(tmp_path, monkeypatch):
    def full(lab):
        """Too much"""
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 99 GiB.\nMore.")
        yield

    def stopped(lab):
        """Never through"""
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(table, "ROWS", {"H9": rows.h9, "H1": full, "H2": stopped})
    with pytest.raises(KeyboardInterrupt):
        table.run(Told(CPU, torch.float32, "real"), ["H9", "H1", "H2"], tmp_path, minutes=1, tell=lambda row: None)
    found = json.loads((tmp_path / "bench.json").read_text())
    assert [row["name"] for row in found["rows"]] == ["H9", "H1"]
    assert found["rows"][0]["figures"][0]["met"] is True and "Tried to allocate 99 GiB." in found["rows"][1]["reason"]
    text = (tmp_path / "bench.md").read_text()
    assert "at most 13: met" in text and "More." not in text


def test_a_device_that_does_not_multiply_8_bits_keeps_the_rest_of_its_row(tmp_path, monkeypatch):
    class Old(Told):
        linears = Lab.linears

    monkeypatch.setattr(fp8, "why_not", lambda device, dtype: "they need compute capability 8.9, this GPU has 8.6")
    (made,) = table.run(Old(CPU, torch.float32, "real"), ["H7"], tmp_path, minutes=1, tell=lambda row: None)
    assert [figure.unit for figure in made.figures] == ["of matmul", "s"] and "8-bit linear layers: they need compute capability 8.9" in made.reason


def test_linear_layers_are_measured_on_one_model_whose_weights_come_back():
    lab = Lab(CPU, torch.float32, "small")
    found = lab.linears("1.3B", "480p x81")["off"]
    assert 0 < found.error < 0.1 and min(found.plain.seconds, found.fp8.seconds) > 0
    assert lab.linears("1.3B", "480p x81")["off"] is found
    assert not any(isinstance(module, fp8.Fp8Linear) for module in lab._transformer("1.3B").modules())
    assert json.loads(json.dumps(table._plain(lab.known)))["linears 1.3B 480p x81"]["off"]["error"] == found.error


def test_no_row_is_begun_when_time_is_spent(tmp_path):
    made = table.run(Told(CPU, torch.float32, "real"), ["H9"], tmp_path, minutes=0, tell=lambda row: None)
    assert "not begun" in made[0].reason


@pytest.mark.slow
def test_every_row_runs_at_small_width(tmp_path):
    answer = muralist("bench", "gpu", "--device", "cpu", "--width", "small", "-o", tmp_path / "out")
    assert answer.code == 0, answer.err
    found = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert [row["name"] for row in found["rows"]] == list(ROWS)
    assert all(row["figures"] and not row["reason"] for row in found["rows"])
    assert all(figure["value"] > 0 for row in found["rows"] for figure in row["figures"] if figure["unit"] != "GB")


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("cpu",), "unknown benchmark 'cpu'"),
        (("gpu", "--width", "huge"), "unknown width 'huge'"),
        (("gpu", "--minutes", 0), "0.0 minutes"),
        (("gpu", "--device", "cpu"), "real sizes take hours on a CPU"),
        (("gpu", "--device", "cpu", "--width", "small", "--only", "H1,H99"), "no row 'H99'"),
        (("gpu", "--device", "cpu", "--width", "small", "--only", "H1", "--quick"), "rows and --quick at once"),
        (("gpu", "--device", "gpu0"), "unknown device 'gpu0'"),
    ],
)
def test_mistakes_are_one_line(arguments, said, tmp_path):
    answer = muralist("bench", *arguments, "-o", tmp_path / "out")
    assert answer.code == 2 and said in answer.error and not (tmp_path / "out").exists()
