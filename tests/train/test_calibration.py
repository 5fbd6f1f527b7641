"""calibrate: one pass over the data, used by any number of compressions."""

from __future__ import annotations

import pytest
import torch

from fips_ext import Recipe, calibrate, compress
from fips_ext.errors import InvalidArgument, NumericalError
from fips_ext.surgery import find_mlps

from ..tiny_models import CASES, build

pytestmark = pytest.mark.usefixtures("single_thread")

TOKENS = 96


def recipe(**fields) -> Recipe:
    small = {"pattern": "bitmap:16x16", "group_size": 2, "steps": 4, "tokens_per_step": 32}
    return Recipe(**{"ratio": 0.8, "calibration_tokens": TOKENS, **small, **fields})


@pytest.mark.parametrize("sensitivity", ["loss", "output"])
def test_compresses_like_the_data_itself(sensitivity: str) -> None:
    states = []
    for reused in (False, True):
        torch.manual_seed(0)
        model, x = build("llama")
        if reused:
            with calibrate(model, [x] * 8, TOKENS) as calibration:
                compress(model, recipe(sensitivity=sensitivity), calibration)
        else:
            compress(model, recipe(sensitivity=sensitivity), [x] * 8)
        states.append(model.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))


def test_serves_several_compressions_of_copies() -> None:
    torch.manual_seed(0)
    first, x = build("vit")
    torch.manual_seed(0)
    second, _ = build("vit")
    with calibrate(first, [x] * 8, TOKENS) as calibration:
        high = compress(first, recipe(ratio=0.9), calibration)
        low = compress(second, recipe(ratio=0.6), calibration)
    assert low.mlp_ratio <= 0.6 < high.mlp_ratio <= 0.9
    assert sum(layer.error_after for layer in high.layers) < sum(layer.error_after for layer in low.layers)


@pytest.mark.parametrize("name", CASES)
def test_sees_every_mlp(name: str) -> None:
    model, x = build(name)
    mlps = find_mlps(model)
    with calibrate(model, [x] * 8, 64) as calibration:
        assert calibration.names == [mlp.name for mlp in mlps]
        for mlp in mlps:
            data = calibration.layer_data(mlp)
            assert data.inputs.shape == data.targets.shape == (64, mlp.width)
            assert data.power > 0
            for kind in ("loss", "output"):
                problems = calibration.problems(mlp, kind)
                assert problems.keys() == mlp.linears().keys()
                nothing = [p.error(torch.zeros_like(p.weight)) for p in problems.values()]
                assert all(error > 0 for error in nothing)


def test_refuses_what_it_does_not_fit() -> None:
    model, x = build("llama")
    other, _ = build("vit")
    with calibrate(model, [x] * 8, TOKENS, loss=False) as calibration:
        with pytest.raises(InvalidArgument, match="loss=True"):
            compress(model, recipe(), calibration)
        with pytest.raises(InvalidArgument, match="other MLPs"):
            compress(other, recipe(sensitivity="output"), calibration)
        compress(model, recipe(sensitivity="output"), calibration)
    with pytest.raises(InvalidArgument, match="closed"):
        calibration.check(find_mlps(build("llama")[0]), False)


def test_what_is_spilled_has_no_name(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """So that nothing is left behind, however the process ends."""
    monkeypatch.setattr("fips_ext.train.activations.HOST_LIMIT", 0)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    model, x = build("llama")
    with calibrate(model, [x] * 8, TOKENS) as calibration:
        assert calibration._store.spilled
        assert not list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())
    with torch.no_grad():
        find_mlps(model)[1].down.weight[0, 0] = float("nan")
    with pytest.raises(NumericalError):
        calibrate(model, [x] * 8, TOKENS)
    with pytest.raises(InvalidArgument):
        calibrate(build("llama")[0], [x], 10_000)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("tokens", "probes"), [(96, [7]), (90, [7]), (192, [14, 15])])
def test_probes_are_batches_of_held_out_rows_only(tokens: int, probes: list[int]) -> None:
    """Those that begin in the last eighth of the rows."""
    model, x = build("llama")
    batches = [x[:1].clone() for _ in range(18)]  # 12 tokens each
    with calibrate(model, batches, tokens, keep_batches=17) as calibration:
        assert [i for i, b in enumerate(batches) if any(b is p for p in calibration.probes)] == probes
        assert len(calibration.batches) == 17
    assert not calibration.probes


@pytest.mark.parametrize("form", ["tensor", "dict"])
def test_of_one_large_batch_the_last_eighth_probes(form: str) -> None:
    model, _ = build("llama")
    ids = torch.arange(20 * 12).view(20, 12) % 60
    mask = torch.ones_like(ids)
    batch = ids if form == "tensor" else {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    with calibrate(model, [batch], 240) as calibration:
        (probe,) = calibration.probes
        if form == "dict":
            assert probe["use_cache"] is False
            assert torch.equal(probe["attention_mask"], mask[17:])
            probe = probe["input_ids"]
        assert torch.equal(probe, ids[17:])
