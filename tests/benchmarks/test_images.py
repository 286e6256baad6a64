"""Images moved by flows: measures in closed form, splits, bad input, and runs on scikit-learn's digits."""

from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from support.bench_settings import configured
from support.made_once import made_once
from support.places import data_path

import pfm
from benchmarks import report as reports
from benchmarks.core.bench import Bench
from benchmarks.core.runner import run
from benchmarks.core.schemas import choices
from benchmarks.images import fields
from benchmarks.images.data import DIGITS, check_images, load_images, one_hot, read_npz
from benchmarks.images.generator import Draws, Generator, GeneratorSettings
from benchmarks.images.judges import Gradients, LeNet, Perceptron
from benchmarks.images.lesson import Lesson, log_odds
from benchmarks.images.measures import frechet_distance, precision_recall, within_digit_diversity
from benchmarks.images.spaces import Noise, Pixels
from benchmarks.images.stored import Training, trained
from benchmarks.images.task import _choose
from benchmarks.methods import make_method
from benchmarks.methods.images.policy import _log_ratio
from benchmarks.tasks import load_task

T = TypeVar("T")
SETTINGS = GeneratorSettings(widths=(8, 8), noise=3)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uniform(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def known(value: T | None) -> T:
    assert value is not None
    return value


ROWS = normal(400, 3)


# -- measures -------------------------------------------------------------------------------------------------------


def test_frechet_distance_of_normal_rows_is_that_of_their_moments():
    assert frechet_distance(ROWS, ROWS) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(ROWS + torch.tensor([3.0, 4.0, 0.0]), ROWS) == pytest.approx(25, rel=1e-5)
    own = frechet_distance(2 * (ROWS - ROWS.mean(0)), ROWS - ROWS.mean(0))
    assert own == pytest.approx(float(ROWS.double().T.cov().trace()), rel=1e-5)  # (2 s - s)^2 along every axis


def test_precision_falls_with_what_is_off_the_data_and_recall_with_what_is_missing():
    line = torch.linspace(0, 1, 101)[:, None]
    assert precision_recall(line, line, 1) == (1.0, 1.0)
    half = torch.cat([line[:50], line[:51] + 10])
    precision, recall = precision_recall(half, line, 1)
    assert precision == pytest.approx(50 / 101)
    assert recall == pytest.approx(51 / 101, abs=0.011)
    with pytest.raises(ValueError, match=r"neighbours must lie in 1\.\.100"):
        precision_recall(line, line, 101)


def test_diversity_is_a_ratio_of_mean_distances_with_an_interval_around_it():
    theirs = [torch.cdist(part, part).double().numpy() for part in ROWS.chunk(4)]
    found = known(within_digit_diversity([0.5 * part for part in theirs], theirs))
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))
    assert known(within_digit_diversity([0 * part for part in theirs], theirs)).value == 0
    other = normal(100, 3, seed=1)
    scattered = known(within_digit_diversity([torch.cdist(other, other).double().numpy()], theirs[:1]))
    assert 0.8 < scattered.low < scattered.value < scattered.high < 1.5


def test_log_odds_agree_with_probabilities_and_do_not_saturate():
    judge, images, digits = Perceptron(8).eval(), uniform(20, 1, 8, 8), torch.arange(20) % DIGITS
    torch.testing.assert_close(torch.sigmoid(log_odds(judge, images, digits)), judge.right(images, digits))
    with torch.no_grad():
        judge.get_parameter("body.3.bias")[3] = 200.0
        wins = log_odds(judge, images[:2], torch.tensor([3, 3]))
    assert wins.min() > 150
    assert wins[0] != wins[1]


def test_gradients_see_the_direction_of_edges_and_not_the_level_of_grey():
    third, dark = Gradients(8), torch.zeros(1, 1, 8, 8)
    dark[..., 3:5] = 0.4  # a vertical bar: its gradients are horizontal, the first of nine orientations
    bar, bright, level = third.histograms(dark), third.histograms(dark + 0.3), third.histograms(dark.mT)
    assert bar.shape == (1, 324)
    # Nine orientations in four cells of nine blocks; the outer blocks see the image's edge, the middle one does not.
    middle = [h.view(9, 4, 9)[:, :, 4].sum(1) for h in (bar, bright, level)]
    torch.testing.assert_close(middle[0], middle[1])
    assert int(middle[0].argmax()) == 0
    assert set(middle[2].nonzero().flatten().tolist()) == {4, 5}  # between the two


def test_settings_are_chosen_without_the_independent_judge():
    found = {
        "weak": {"labelled": 0.8, "diversity": 0.95, "precision": 0.7},
        "good": {"labelled": 0.9, "diversity": 0.85, "precision": 0.7},
        "narrow": {"labelled": 0.99, "diversity": 0.4, "precision": 0.9},
        "unreal": {"labelled": 0.999, "diversity": 1.4, "precision": 0.1},
    }
    assert _choose(found, precision=0.7) == "good"
    assert _choose({"narrow": found["narrow"]}, precision=0.7) == "narrow"


# -- data, generator, spaces ----------------------------------------------------------------------------------------


def test_parts_of_the_digits_share_no_image():
    split = load_images("digits")
    parts = [split.generator, split.judge, split.test]
    assert [len(part) for part in parts] == [900, 600, 297]
    names = [{image.numpy().tobytes() for image in part.images} for part in parts]
    assert not names[0] & names[2]
    assert not names[1] & names[2]
    assert len(names[0] & names[1]) == 0


def test_mnist_and_the_labelling_judge_are_those_of_the_paper():
    data_path("mnist")
    split = load_images("mnist")
    assert (len(split.generator), len(split.judge), len(split.test)) == (30_000, 30_000, 10_000)
    judge = LeNet.from_npz(known(split.lenet)).eval()
    assert judge.accuracy(type(split.test)(split.test.images[:2000], split.test.digits[:2000])) > 0.97


def test_the_second_head_scales_pixel_noise_within_the_range():
    generator = Generator(8, SETTINGS).eval().requires_grad_(False)
    context, noise = one_hot(torch.arange(6)), torch.zeros(6, 3)
    plain = generator(noise, context)
    assert torch.equal(plain, generator.decode(noise, torch.arange(6)))
    loud = generator(noise, context, torch.full((6, 64), 1.0))
    assert 0 < float((loud - plain).mean()) < 0.1
    assert float(generator(noise, context, torch.full((6, 64), 50.0)).max()) == 1.0


def test_pixels_are_encoded_and_decoded_exactly():
    images = uniform(4, 1, 8, 8).round(decimals=1)
    space, draws = Pixels(8), Draws(torch.zeros(4, 1), torch.arange(4), images)
    torch.testing.assert_close(space.decode(space.encode(draws), draws.digits), images)
    wild = space.decode(torch.full((4, 1, 8, 8), 1e4), draws.digits)
    assert float(wild.max()) == 1.0


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 1, 32, 32), r"must be \(N, 1, 8, 8\).*got \(2, 1, 32, 32\); resize"),
        (torch.zeros(2, 8, 8), r"got \(2, 8, 8\)"),
        (torch.zeros(0, 1, 8, 8), "N >= 1"),
        (torch.full((2, 1, 8, 8), 255.0), r"got 255 to 255; divide bytes by 255"),
        (-torch.ones(2, 1, 8, 8), r"map tanh by"),
        (torch.full((2, 1, 8, 8), torch.nan), "must be finite"),
    ],
)
def test_images_of_another_size_or_range_are_refused(images: torch.Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        check_images("images", images, 8)


def test_images_of_another_type_are_refused():
    with pytest.raises(TypeError, match="divided by 255"):
        check_images("images", torch.zeros(2, 1, 8, 8, dtype=torch.uint8), 8)
    with pytest.raises(TypeError, match="got ndarray"):
        check_images("images", np.zeros((2, 1, 8, 8)), 8)  # pyright: ignore[reportArgumentType]


def test_damaged_files_are_named(tmp_path: Path):
    path = tmp_path / "cut.npz"
    np.savez(path, images=np.zeros((2, 28, 28), np.uint8))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"cut\.npz is damaged"):
        read_npz(path)
    np.savez(path, images=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match=r"cut\.npz is damaged or no npz file of arrays"):
        read_npz(path)
    np.savez(path, conv__c1__weight=np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="does not hold the weights of this LeNet"):
        LeNet.from_npz(path)


# -- what is learned from -------------------------------------------------------------------------------------------


def lesson() -> Lesson:
    """Ten sets of four draws, scored by how bright they are."""
    generator = Generator(8, SETTINGS).eval().requires_grad_(False)
    made = Lesson.drawn(generator, Perceptron(8).eval().requires_grad_(False), 10, 4, 0, {})
    return Lesson(generator, made.labelling, made.draws, 4, made.draws.images.mean((1, 2, 3)), 0, {})


def test_pairs_join_draws_of_one_set_by_their_scores():
    some = lesson()
    brightness = some.draws.images
    pairs = some.pairs(brightness)
    assert (len(pairs), pairs.event_shape, pairs.context_dimension) == (20, (1, 8, 8), 10)
    assert bool((pairs.chosen.mean((1, 2, 3)) > pairs.rejected.mean((1, 2, 3))).all())
    assert torch.equal(known(pairs.context).argmax(1), torch.arange(10).repeat_interleave(2))
    swapped = some.pairs(brightness, labels="swapped")
    assert torch.equal(swapped.chosen, pairs.rejected)
    extremes = some.pairs(brightness, target="extremes")
    sets = brightness.mean((1, 2, 3)).view(10, 4)
    torch.testing.assert_close(extremes.chosen.mean((1, 2, 3)), sets.max(1).values)
    torch.testing.assert_close(extremes.rejected.mean((1, 2, 3)), sets.min(1).values)
    assert [len(entry.rows) for entry in known(some.pairs(brightness, target="sets").candidates)] == [4] * 10
    with pytest.raises(ValueError, match=r"method\.target must be one of pairs, sets, extremes: got 'best'"):
        some.pairs(brightness, target="best")


def test_a_field_of_another_shape_and_vectors_of_another_space_are_refused():
    @pfm.register_field("images-test-narrow")
    class Narrow(fields.UNet):
        def forward(self, t: torch.Tensor, y: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
            return super().forward(t, y, context)[..., :-1]

    some = lesson()
    pairs = some.pairs(some.draws.images)
    config = pfm.FlowConfig(field="images-test-narrow", linear=False, epochs=1)
    with pytest.raises(
        ValueError, match=r"must return a velocity of the shape of y, \(3, 1, 8, 8\): got \(3, 1, 8, 7\)"
    ):
        pfm.PreferenceFlow.fit(pairs, config, progress=False)
    with pytest.raises(ValueError, match="takes square images"):
        fields.UNet((100,), 10)
    with pytest.raises(ValueError, match=r"y of space 'noise' must be \(2, 3\): got \(2, 4\)"):
        Noise(some.generator).decode(torch.zeros(2, 4), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"y of space 'pixels' must be \(2, 1, 8, 8\)"):
        Pixels(8).decode(torch.zeros(2, 64), torch.zeros(2, dtype=torch.long))


def test_the_log_ratio_of_a_normal_policy_is_that_of_torch():
    z, mean, log_scale = ROWS[:5], ROWS[5:10], 0.1 * ROWS[10:15]
    policy, reference = torch.distributions.Normal(mean, log_scale.exp()), torch.distributions.Normal(0.0, 1.0)
    expected = (policy.log_prob(z) - reference.log_prob(z)).sum(1)
    torch.testing.assert_close(_log_ratio(z, mean, log_scale), expected)


# -- resuming -------------------------------------------------------------------------------------------------------


def test_a_training_that_was_cut_short_ends_as_one_that_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PFM_CACHE", str(tmp_path))

    def fit(name: str, stop: int | None) -> torch.nn.Linear:
        torch.manual_seed(0)
        layer = torch.nn.Linear(2, 1)

        def train(folder: Path) -> dict[str, int]:
            optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
            training = Training(folder, {"layer": layer, "optimizer": optimizer})
            for number in training.remaining(6, "test", False):
                if number == stop:
                    raise KeyboardInterrupt
                x = torch.randn(8, 2, generator=torch.Generator().manual_seed(number))
                loss = (layer(x) - x.sum(1, keepdim=True)).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                training.save()
            return {"parts": training.done}

        assert trained("test", {"name": name}, layer, train) == {"parts": 6}
        return layer

    whole = fit("whole", None)
    with pytest.raises(KeyboardInterrupt):
        fit("cut", 3)
    resumed = fit("cut", None)
    assert torch.equal(whole.weight, resumed.weight)
    assert torch.equal(fit("cut", 0).weight, whole.weight)  # from the cache: nothing is trained
    for model in tmp_path.rglob("model.safetensors"):
        model.write_bytes(b"cut")
    with pytest.raises(ValueError, match="delete it, and it is trained again"):
        fit("whole", 0)


@pytest.mark.parametrize("way", ["fused", "foreach"])
def test_moments_of_transposed_parameters_are_kept(tmp_path: Path, way: str):
    """A file holds tensors in rows; a fused step pairs moments and parameters by their places in memory."""

    def fit(folder: Path, stops: tuple[int, ...]) -> torch.nn.Linear:
        for stop in (*stops, 6):
            torch.manual_seed(0)
            layer = torch.nn.Linear(3, 5)
            layer.weight = torch.nn.Parameter(torch.randn(3, 5).T)
            assert not layer.weight.is_contiguous()
            options: dict[str, Any] = {way: True}
            optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, **options)
            training = Training(folder, {"layer": layer, "optimizer": optimizer})
            for number in training.remaining(stop, "test", False):
                x = torch.randn(8, 3, generator=torch.Generator().manual_seed(number))
                loss = (layer(x) - x.sum(1, keepdim=True) * torch.arange(5.0)).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                training.save()
        return layer

    whole, resumed = fit(tmp_path / "whole", ()), fit(tmp_path / "cut", (1, 4))
    assert torch.equal(whole.weight, resumed.weight)
    assert torch.equal(whole.bias, resumed.bias)


# -- whole runs on scikit-learn's digits ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache in which the generator and the judges of the digits lie."""

    def fill(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PFM_CACHE", str(folder))
            settings = configured("task=digits", "method=images/reference")
            load_task(settings.task, 0).run(make_method(settings.method), Bench("minilm", "truncate", 0, False))

    return made_once(tmp_path_factory, "digits", fill)


def test_every_method_learns_and_moves():
    methods = [name for name in choices("method") if name.startswith("images/")]
    assert methods
    for name in methods:
        method = make_method(configured("task=digits", f"method={name}").method)
        assert callable(method.learn)
        assert callable(method.move)


def test_runs_end_in_a_report(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setenv("PFM_CACHE", str(cache))
    score = {}
    for name in ("reference", "best_of_labelling", "shift_noise", "shift_shuffled"):
        labels = "method.labels=shuffled" if name == "shift_shuffled" else "method.labels=given"
        method = "shift_noise" if name == "shift_shuffled" else name
        settings = configured(
            "task=digits", f"method=images/{method}", labels, progress="false", threads=1, out=tmp_path
        )
        folder = tmp_path / name
        folder.mkdir()
        score[name] = run(settings, folder)
    assert score["best_of_labelling"] > score["reference"] + 0.05
    assert score["shift_noise"] > score["reference"] + 0.05
    assert abs(score["shift_shuffled"] - score["reference"]) < 0.06
    assert reports.main([str(tmp_path)]) == 0
    assert "| Best of n by the labelling judge | 1 | n=" in capsys.readouterr().out
    for figure in ("digits.png", "digits-images.png"):
        assert (tmp_path / figure).stat().st_size > 5000


def test_a_flow_in_pixels_by_a_unet_moves_towards_the_labels(cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PFM_CACHE", str(cache))
    settings = configured(
        "task=digits", "method=images/pixels_best", "method.flow.epochs=4", "method.strengths=[1.0]",
        "method.keeps=[1.0]", "method.flow.steps=2",
    )  # fmt: skip
    outcome = load_task(settings.task, 0).run(make_method(settings.method), Bench("minilm", "truncate", 0, False))
    assert known(outcome.figures["x1.gain"]).low > 0
    assert known(outcome.figures["calls"]).value == 1
    assert set(outcome.about["accuracies"]) == {"labelling", "independent", "third"}


def test_too_few_draws_are_refused_before_anything_is_trained():
    settings = configured("task=digits", "method=images/reference", "task.tested=0")
    with pytest.raises(ValueError, match=r"task\.tested must be at least 2: got 0"):
        load_task(settings.task, 0).run(make_method(settings.method), Bench("minilm", "truncate", 0, False))


def test_methods_of_other_tasks_are_refused():
    settings = configured("task=digits", "method=pfm")
    with pytest.raises(TypeError, match="does not move images"):
        load_task(settings.task, 0).run(make_method(settings.method), Bench("minilm", "truncate", 0, False))
