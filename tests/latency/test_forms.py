"""Step times by formula against numbers worked out by hand, files against what was saved, and ranges that are told."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path

import pytest

from ds_jax.latency import LatencyProfile, PaperForm, StepFit, load, paper_form, wrong_by
from ds_jax.protocol import Instance, Role
from models.folder import read_configs

FIT = StepFit(1, (0.010, 1e-4, 1e-8), (0.020, 1e-6, 1e-4), (0.005, 1e-6, 3e-4))
CHECKOUT = Path(__file__).resolve().parents[2]
PROFILE = LatencyProfile("gpu", "model", "float16", {1: FIT})


def test_prompts_cost_their_tokens_and_their_squares():
    # 10 ms + 0.1 ms x 300 + 1e-5 ms x (100^2 + 200^2)
    assert FIT.step_s([(0, 100), (0, 200)], 0, 0) == pytest.approx(0.010 + 0.030 + 0.0005)


def test_chunks_of_a_prompt_cost_the_attention_of_the_whole():
    whole, parts = FIT.step_s([(0, 1000)], 0, 0), FIT.step_s([(0, 400)], 0, 0) + FIT.step_s([(400, 600)], 0, 0)
    assert parts - whole == pytest.approx(0.010), "one base more, and nothing else"


def test_decodes_cost_by_context_and_batch_and_large_batches_have_a_fit_of_their_own():
    assert FIT.step_s((), 95, 50_000) == pytest.approx(0.020 + 0.050 + 0.0095)
    assert FIT.step_s((), 96, 50_000) == pytest.approx(0.005 + 0.050 + 0.0288)
    assert FIT.step_s((), 0, 0) == 0.0


def test_a_mixed_step_pays_the_larger_base_once():
    # 16 tokens of prompt alone take 10 ms + 1.6 ms + 2.56 us: less than reading the weights for the decodes
    assert FIT.step_s([(0, 16)], 4, 1000) == pytest.approx(FIT.step_s((), 4, 1000))
    mixed = FIT.step_s([(0, 512)], 4, 1000)
    assert mixed == pytest.approx(FIT.step_s([(0, 512)], 0, 0) + 1000e-6 + 4e-4)
    assert mixed < FIT.step_s([(0, 512)], 0, 0) + FIT.step_s((), 4, 1000)


def test_l_m_is_the_shortest_prompt_with_nine_tenths_of_the_best_throughput():
    def throughput(tokens: int) -> float:
        return tokens / FIT.step_s([(0, tokens)], 0, 0)

    best = max(map(throughput, range(1, 3000)))
    length = FIT.saturation_tokens()
    assert throughput(length) >= 0.9 * best > throughput(length - 1)


def test_the_papers_form_against_numbers_worked_out_by_hand():
    opt = read_configs(str(CHECKOUT / "models/published/opt-13b")).arch
    arch = dataclasses.replace(opt, hidden_size=100, intermediate_size=400)
    form = PaperForm(1e-9, 2e-9, 0.003, 4e-9, 5e-9, block=16)
    # h = 100, m = 400: 4 h^2 + 2 h m = 120,000; on two devices h = 50, m = 200: 30,000
    one, two = form.step_fit(arch, 1), form.step_fit(arch, 2)
    assert one.step_s([(0, 10), (0, 20)], 0, 0) == pytest.approx(
        1e-9 * 30 * 120_000 + 2e-9 * 3 * 100 * 500 / 16 + 0.003
    )
    assert one.step_s((), 7, 900) == pytest.approx(4e-9 * 120_000 + 5e-9 * 3 * 100 * 900)
    assert two.step_s([(0, 10)], 0, 0) == pytest.approx(1e-9 * 10 * 30_000 + 2e-9 * 3 * 50 * 100 / 16 + 0.003)


def test_a_fit_and_its_papers_form_are_the_same_but_for_the_cost_per_sequence():
    arch = read_configs(str(CHECKOUT / "models/published/opt-13b")).arch
    fit = StepFit(2, (0.015, 7e-5, 2e-9), (0.013, 3e-7, 6e-5))
    again = paper_form(fit, arch).step_fit(arch, 2)
    assert again.step_s([(0, 700)], 0, 0) == pytest.approx(fit.step_s([(0, 700)], 0, 0))
    assert again.step_s((), 50, 30_000) == pytest.approx(fit.step_s((), 50, 30_000) - 50 * 6e-5)


def test_a_profile_is_read_as_it_was_saved(tmp_path):
    ranged = dataclasses.replace(FIT, prompt_tokens=(1.0, 2048.0), prefill_error=0.03)
    profile = dataclasses.replace(PROFILE, fits={1: ranged, 2: FIT}, kv_tokens={"1,1": 99}, extrapolated=True)
    profile.save(tmp_path / "p.json")
    assert load(tmp_path / "p.json") == profile


@pytest.mark.parametrize(
    "change",
    [{"format": 9}, {"fits": None}, {"fits": {"1": {"tp": 1, "prefill": [1, 2], "decode": [1, 2, 3]}}}, {"more": 1}],
)
def test_a_file_that_is_no_profile_is_refused_by_name(tmp_path, change):
    PROFILE.save(tmp_path / "p.json")
    record = json.loads((tmp_path / "p.json").read_text()) | change
    (tmp_path / "p.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="p.json: not a latency profile"):
        load(tmp_path / "p.json")


def test_a_tensor_parallelism_that_was_not_measured_is_refused_with_those_that_were():
    with pytest.raises(ValueError, match="tp = 4 is not in the latency profile of model on gpu: it has 1"):
        PROFILE.step_time(4)


def test_what_lies_outside_the_measured_range_is_told_once():
    profile = dataclasses.replace(PROFILE, fits={1: dataclasses.replace(FIT, prompt_tokens=(1, 2048))}, outside={})
    with pytest.warns(RuntimeWarning, match="4096 is outside the measured 1 to 2048") as told:
        for step_time in (profile.step_time(1), profile.step_time(1, 2)):
            assert step_time.step_s([(0, 4096)], 0, 0) == pytest.approx(FIT.step_s([(0, 4096)], 0, 0))
            step_time.step_s([(0, 5000)], 0, 0)
    assert len(told) == len(profile.outside) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        profile.step_time(1).step_s([(0, 2048)], 0, 0)


def test_a_wrong_predictor_is_wrong_by_its_factor_and_knows_no_more_than_the_right_one():
    def right(instance: Instance):
        return PROFILE.step_time(1, instance.lanes) if instance.role is Role.DECODE else None

    wrong = wrong_by(right, 1.1)
    decode = Instance(0, Role.DECODE, 0, 10, 16, lanes=2)
    assert wrong(decode).step_s((), 3, 100) == pytest.approx(1.1 * FIT.step_s((), 3, 100))
    assert wrong(decode).stages == 2
    assert wrong(dataclasses.replace(decode, role=Role.PREFILL)) is None


@pytest.mark.parametrize(
    "name", ["a100_80g_opt_13b", "a100_80g_opt_13b_vllm", "a100_80g_opt_66b", "a100_80g_opt_66b_vllm"]
)
def test_the_profiles_that_come_with_the_project_are_whole(name):
    profile = load(CHECKOUT / f"configs/latency/{name}.json")
    for tp, fit in profile.fits.items():
        assert fit.tp == tp and 0 < fit.step_s((), 95, 50_000) < 1
        assert 0 < fit.step_s((), 96, 50_000) < 1 and 0 < fit.step_s([(0, 512)], 0, 0) < 1
        assert profile.kv_tokens[f"{tp},2"] > 0


def test_a100_figures_against_those_published():
    fit = load(CHECKOUT / "configs/latency/a100_80g_opt_13b.json").fits[1]
    # 18.1025 + 0.1019123 x 512 + 7.12226e-6 x 512^2 ms; 19.9347 + 6.26936e-4 x 20,000 + 0.038507 x 64 ms
    assert fit.step_s([(0, 512)], 0, 0) == pytest.approx(0.0721486, rel=1e-4)
    assert fit.step_s((), 64, 20_000) == pytest.approx(0.0349379, rel=1e-4)
